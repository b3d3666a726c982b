"""Requests to completions servers (OpenAI's /v1/completions as vLLM, SGLang and `transformers
serve` offer it).

Fields and endpoints: vllm/entrypoints/openai/completion/protocol.py and docs/features/lora.md;
sglang/srt/entrypoints/openai/protocol.py and its /load_lora_adapter;
transformers/cli/serving/completion.py, which takes text alone, one response per request, and a
whole generation config as JSON.
"""

import json
import logging
import os
import uuid
import weakref
from pathlib import Path

from data_prep.errors import UserError
from data_prep.http import HttpClient
from data_prep.http_answers import GarbledAnswer
from data_prep.models.policy import Policy
from data_prep.sampling.law import SamplingServer, SamplingSettings, generation_arguments
from data_prep.sampling.served_adapters import ServedAdapters, list_models
from data_prep.servers import Servers
from data_prep.settings import derive_seed
from data_prep.urls import resolve_urls

log = logging.getLogger(__name__)

ONE_PER_REQUEST = ("transformers", "sglang")
"""transformers serve ignores `n`; SGLang gives all `n` of a request one seed, where it heeds seeds
at all."""


class CompletionServers:
    """The servers that a recipe names. Raises UserError at once where their key is not set.

    owner: names whose adapters are put on them (a run's folder); None: this process alone. They are
    taken off again at the next use of another, at `release`, and when this goes away.
    """

    def __init__(self, settings: SamplingServer, owner: str | None = None) -> None:
        # transformers serve answers one request after the other, and a seed is its whole
        # process's.
        self.settings = (
            settings.model_copy(update={"concurrency": 1})
            if settings.kind == "transformers"
            else settings
        )
        self.servers = Servers(self.settings, resolve_urls(settings.base_url))
        owner = f"{os.getpid()}-{uuid.uuid4()}" if owner is None else owner
        self.adapters = ServedAdapters(self.settings, owner)
        weakref.finalize(self, _release, self.servers, self.adapters)

    def identity(self) -> str:
        """Name the kind and the served model, after asking every server whether it serves it.

        What it serves under that name, its version and its place are no part of it: every table
        that it draws is compared with the policy (`constrained_dpo.estimates.draws`). Raises
        UserError where a server does not serve the model.
        """
        if self.settings.kind != "transformers":
            # whose list holds what lies in the hub's cache, not what it serves
            self.servers.each(self._require_model)
        return f"{self.settings.kind}:{self.settings.model}"

    def _require_model(self, url: str, client: HttpClient) -> None:
        names = sorted(str(model.get("id")) for model in list_models(url, client))
        if self.settings.model not in names:
            raise UserError(
                f"{url}: does not serve {self.settings.model}, but {', '.join(names) or 'nothing'}"
                "; set sampling.server.model"
            )

    def release(self) -> None:
        """Take the adapters off the servers; one that is gone has none."""
        _release(self.servers, self.adapters)

    def complete(
        self,
        policy: Policy,
        prompts: list[list[int]],
        count: int,
        settings: SamplingSettings,
        adapter: Path | None,
        seed: int,
    ) -> tuple[list[dict], list[str]]:
        """The servers' choices, `count` per prompt in the prompts' order, and who drew each; each
        has the index of its request's seed.

        The adapter (None: the base) is put on every server first, and again on one that was
        restarted and knows it no more.
        """
        model = self.adapters.model(adapter)
        # the server knows no tempered policy
        temperature = settings.temperature * policy.settings.temperature
        settings = settings.model_copy(update={"temperature": temperature})
        per_request = 1 if self.settings.kind in ONE_PER_REQUEST else count
        bodies = []
        for row, prompt in enumerate(prompts):
            body = self._body(policy, prompt, settings, model) | (
                {} if per_request == 1 else {"n": per_request}
            )
            for number in range(count // per_request):
                # 31 bits: what every server's integer holds
                bodies.append(body | {"seed": derive_seed(seed, row, "request", number) >> 32})
        answers: list[list[dict]] = [[] for _ in bodies]
        drawn_by = [""] * len(bodies)

        def check(body: dict | None, answer: dict) -> None:
            _read_choices(answer, (body or {}).get("n", 1))

        def ready(url: str, again: bool) -> None:
            self.adapters.put(url, self.servers.clients[url], adapter, again)

        for index, url, answer in self.servers.post_all(
            "/completions", bodies, desc="sample", check=check, make_ready=ready
        ):
            usage = answer.get("usage") or {}
            counted = (
                {"completion_tokens": usage.get("completion_tokens")} if per_request == 1 else {}
            )
            answers[index] = [choice | counted for choice in _read_choices(answer, per_request)]
            drawn_by[index] = url
        choices = [choice for answer in answers for choice in answer]
        return choices, [url for url in drawn_by for _ in range(per_request)]

    def _body(
        self, policy: Policy, prompt: list[int], settings: SamplingSettings, model: str
    ) -> dict:
        kind = self.settings.kind
        body = {
            "model": model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if kind == "transformers":
            config = generation_arguments(settings, policy.eos_ids, policy.tokenizer.pad_token_id)
            # What is None here would come from the served model's own config; 0 switches it
            # off.
            config |= {
                "min_p": 0.0,
                "epsilon_cutoff": 0.0,
                "eta_cutoff": 0.0,
                "no_repeat_ngram_size": 0,
            }
            return body | {
                "prompt": prompt_text(policy, prompt),
                "generation_config": json.dumps(config),
            }
        body |= {"prompt": prompt, "logprobs": 1}
        if kind == "openai":
            return body
        off = {"top_k": 0 if kind == "vllm" else -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return body | off | {"stop_token_ids": list(policy.eos_ids), "return_token_ids": True}


def _release(servers: Servers, adapters: ServedAdapters) -> None:
    for url, client in servers.clients.items():
        try:
            if adapters.is_on(url) and client.answers(f"{url}/models"):
                adapters.drop(url, client)
        except UserError as error:
            log.warning("%s; an adapter may be left on it", error)


def _read_choices(answer: dict, count: int) -> list[dict]:
    """The choices in order; raises GarbledAnswer where there are not `count` with a text."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(
        isinstance(c, dict) and isinstance(c.get("text"), str) for c in choices
    ):
        raise GarbledAnswer(f"the answer has no choices with a text: {json.dumps(answer)[:200]}")
    if len(choices) != count:
        raise GarbledAnswer(
            f"the answer has {len(choices)} choices where {count} were asked for (is "
            "sampling.server.kind right?)"
        )
    return sorted(choices, key=lambda choice: choice.get("index", 0))


def prompt_text(policy: Policy, prompt: list[int]) -> str:
    """A text that the tokenizer turns into exactly these ids, for servers that take no ids; raises
    UserError where there is none."""
    tokenizer = policy.tokenizer
    whole = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bare = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    without_bos = whole.removeprefix(tokenizer.bos_token or "")
    for text in (whole, without_bos, without_bos.removeprefix(" "), bare):
        if tokenizer(text)["input_ids"] == prompt:
            return text
    raise UserError(
        f"sampling.server: a prompt's tokens are not those of any text ({whole[:60]!r}), and this "
        "kind of server takes text only; use vllm "
        "or sglang, or another template"
    )
