"""A run's adapters on its completions servers: loaded before they are asked for, unloaded before
anything else is.

A server holds one adapter of a run at a time, and none while the reference policy is asked. Names
carry the owner's hash and the adapter's, so that several runs share a server, what has the name has
the weights, and what a killed run left behind is known as its own. vLLM's frontend forgets an
adapter that is unloaded; its engine drops the least recently used one when a slot is needed.
"""

import hashlib
from pathlib import Path

from data_prep.errors import ServerRefused, UserError
from data_prep.http import HttpClient
from data_prep.http_answers import GarbledAnswer
from data_prep.models.adapters import fingerprint_adapter
from data_prep.models.attachment import check_lora_only
from data_prep.sampling.law import SamplingServer


class ServedAdapters:
    """The adapters of an owner (a run, or a check of a recipe).

    owner: names it among all that use the servers; the same for a run that is continued.
    """

    def __init__(self, settings: SamplingServer, owner: str) -> None:
        self.settings = settings
        self.prefix = f"cdpo-{hashlib.sha256(owner.encode()).hexdigest()[:8]}-"
        self._present: dict[str, str | None] = {}

    @property
    def loads(self) -> bool:
        """Whether adapters get there by a call."""
        return self.settings.adapter_model is None

    def name(self, adapter: Path | None) -> str | None:
        """Name an adapter on the servers; None: the base. Raises UserError for one that holds more
        than LoRA layers."""
        if adapter is None:
            return None
        check_lora_only(Path(adapter).resolve(), "sampling.server")
        return f"{self.prefix}{fingerprint_adapter(Path(adapter).resolve())}"

    def model(self, adapter: Path | None) -> str:
        """Give the model name to ask for."""
        settings, name = self.settings, self.name(adapter)
        if adapter is None or name is None:
            return settings.model
        if settings.adapter_model is not None:
            path = str(Path(adapter).resolve())
            return settings.adapter_model.replace("{path}", path).replace("{name}", name)
        return f"{settings.model}:{name}" if settings.kind == "sglang" else name

    def put(self, url: str, client: HttpClient, adapter: Path | None, again: bool = False) -> None:
        """Have this adapter on a server, and no other of the owner's.

        The server reads the folder itself: it has to see the same file system. again: it has
        forgotten. Raises UserError where it refuses the adapter.
        """
        name = self.name(adapter)
        if not self.loads or (not again and url in self._present and self._present[url] == name):
            return
        listed = {listed_name(str(model.get("id"))) for model in list_models(url, client)}
        for other in sorted(n for n in listed if n.startswith(self.prefix) and n != name):
            self._unload(url, client, other)
        if name is not None and name not in listed:
            self._load(url, client, name, Path(str(adapter)).resolve())
        self._present[url] = name

    def is_on(self, url: str) -> bool:
        """Whether an adapter was put on a server and not taken off again."""
        return self._present.get(url) is not None

    def drop(self, url: str, client: HttpClient) -> None:
        """Take the owner's adapters off a server."""
        if self.is_on(url):
            self.put(url, client, None)

    def _place(self, url: str) -> str:
        return url.removesuffix("/v1") if self.settings.kind == "sglang" else url

    def _load(self, url: str, client: HttpClient, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            client.post_only(f"{self._place(url)}/load_lora_adapter", body)
        except ServerRefused as error:
            if "already" in str(error):  # another process of the launch was first
                return
            if error.status == 404:
                raise UserError(
                    f"{error}; the server takes no adapters while it runs: start vLLM with "
                    "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                ) from error
            raise

    def _unload(self, url: str, client: HttpClient, name: str) -> None:
        try:
            client.post_only(f"{self._place(url)}/unload_lora_adapter", {"lora_name": name})
        except ServerRefused as error:
            if error.status not in (400, 404):  # gone by now
                raise


def listed_name(model: str) -> str:
    """Give an adapter's name from an entry of /models; SGLang's have the base before it."""
    return model.rsplit(":", 1)[-1]


def list_models(url: str, client: HttpClient) -> list[dict]:
    """Give what a server says that it serves."""
    return client.get(f"{url}/models", _has_models)["data"]


def _has_models(body: dict | None, answer: dict) -> None:
    if not isinstance(answer.get("data"), list) or not all(
        isinstance(model, dict) for model in answer["data"]
    ):
        raise GarbledAnswer(f"the answer lists no models: {str(answer)[:200]}")
