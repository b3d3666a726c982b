"""Responses from a completions server (OpenAI's /v1/completions as vLLM, SGLang and `transformers
serve` offer it).

The server only draws. Token ids are the server's own where it gives them (`return_token_ids` of
vLLM and SGLang), else the text's tokenization, and then counted where their number is not the
server's; log-probabilities always come from a forward pass here, and the server's are kept beside
them (`server_logp`) so that its law can be compared with the policy
(`constrained_dpo.estimates.sampling_law`).

Fields and endpoints: vllm/entrypoints/openai/completion/protocol.py and docs/features/lora.md;
sglang/srt/entrypoints/openai/protocol.py and its /load_lora_adapter;
transformers/cli/serving/completion.py, which takes text alone, one response per request, and a
whole generation config as JSON.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.http import GarbledAnswer, HttpClient, resolve_url
from data_prep.models.adapters import attached_adapter, fingerprint_adapter
from data_prep.models.attachment import check_lora_only
from data_prep.models.policy import Policy
from data_prep.sampling.generate import Sampler, decode
from data_prep.sampling.law import SamplingServer, SamplingSettings, generation_arguments
from data_prep.settings import derive_seed

ONE_PER_REQUEST = ("transformers", "sglang")
"""transformers serve ignores `n`; SGLang gives all `n` of a request one seed, where it heeds seeds
at all."""


class CompletionServer:
    """The server that a recipe names. Raises UserError at once where its key is not set."""

    def __init__(self, settings: SamplingServer) -> None:
        # transformers serve answers one request after the other, and a seed is its whole
        # process's.
        self.settings = (
            settings.model_copy(update={"concurrency": 1})
            if settings.kind == "transformers"
            else settings
        )
        self.url = resolve_url(settings.base_url)
        self.client = HttpClient(self.settings)
        self._loaded: set[str] = set()

    def fingerprint(self) -> str:
        """What the server says it is: its kind, the served model's entry in /models, its version
        where it has a page for that.

        Its weights cannot be hashed; `constrained_dpo.estimates.sampling_law` compares
        log-probabilities instead. Raises UserError where it does not serve the model.
        """
        entry: dict[str, object] = {}
        if (
            self.settings.kind != "transformers"
        ):  # whose list holds what lies in the hub's cache, not what it serves
            models = self.client.get(f"{self.url}/models", _has_models).get("data", [])
            matches = [model for model in models if model.get("id") == self.settings.model]
            if not matches:
                names = ", ".join(sorted(str(model.get("id")) for model in models)) or "nothing"
                raise UserError(
                    f"{self.url}: does not serve {self.settings.model}, but {names}; set "
                    "sampling.server.model"
                )
            entry = {key: matches[0].get(key) for key in ("id", "root", "max_model_len")}
        if self.settings.kind == "vllm":
            entry["version"] = self.client.get(f"{self._root()}/version").get("version")
        told = json.dumps([self.settings.kind, self.settings.model, entry], sort_keys=True)
        return f"{self.settings.kind}:{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def _root(self) -> str:
        return self.url.removesuffix("/v1")

    def model_name(self, adapter: Path | None) -> str:
        """The name to ask for; loads the adapter on the server first where that is how it gets
        there.

        The name holds the adapter's hash, so one that is loaded already has these weights. The
        server reads the folder itself: it has to see the same file system. Raises UserError where
        the server refuses it.
        """
        settings = self.settings
        if adapter is None:
            return settings.model
        path = Path(adapter).resolve()
        check_lora_only(path, "sampling.server")
        name = f"cdpo-{fingerprint_adapter(path)}"
        if settings.adapter_model is not None:
            return settings.adapter_model.replace("{path}", str(path)).replace("{name}", name)
        served = f"{settings.model}:{name}" if settings.kind == "sglang" else name
        if name not in self._loaded and not self._lists(name):
            place = self._root() if settings.kind == "sglang" else self.url
            self.client.post_only(
                f"{place}/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}
            )
        self._loaded.add(name)
        return served

    def _lists(self, name: str) -> bool:
        models = self.client.get(f"{self.url}/models", _has_models)["data"]
        return any(str(model.get("id")).rsplit(":", 1)[-1] == name for model in models)

    def complete(
        self,
        policy: Policy,
        prompts: list[list[int]],
        count: int,
        settings: SamplingSettings,
        model: str,
        seed: int,
    ) -> list[dict]:
        """The server's choices, `count` per prompt in the prompts' order; each has the index of its
        request's seed."""
        per_request = 1 if self.settings.kind in ONE_PER_REQUEST else count
        # the server knows no tempered policy
        temperature = settings.temperature * policy.settings.temperature
        settings = settings.model_copy(update={"temperature": temperature})
        bodies = []
        for row, prompt in enumerate(prompts):
            body = self._body(policy, prompt, settings, model) | (
                {} if per_request == 1 else {"n": per_request}
            )
            for number in range(count // per_request):
                # 31 bits: what every server's integer holds
                bodies.append(body | {"seed": derive_seed(seed, row, "request", number) >> 32})
        answers: list[list[dict]] = [[] for _ in bodies]

        def check(body: dict | None, answer: dict) -> None:
            _read_choices(answer, (body or {}).get("n", 1))

        for index, answer in self.client.post_all(
            f"{self.url}/completions", bodies, desc="sample", check=check
        ):
            usage = answer.get("usage") or {}
            counted = (
                {"completion_tokens": usage.get("completion_tokens")} if per_request == 1 else {}
            )
            answers[index] = [choice | counted for choice in _read_choices(answer, per_request)]
        return [choice for answer in answers for choice in answer]

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


def _has_models(body: dict | None, answer: dict) -> None:
    if not isinstance(answer.get("data"), list) or not all(
        isinstance(model, dict) for model in answer["data"]
    ):
        raise GarbledAnswer(f"the answer lists no models: {json.dumps(answer)[:200]}")


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


def read_choice(policy: Policy, choice: dict) -> tuple[list[int], str, float, bool]:
    """(token ids, text, server's log-probability in nats or NaN, whether the ids are surely those
    that were drawn).

    Ids are the server's, with the EOS that some leave out; or else the text's tokenization, with
    EOS where it stopped by itself.
    """
    ids, text = choice.get("token_ids"), choice["text"]
    stopped = choice.get("finish_reason") == "stop"
    if ids:
        ids = [int(i) for i in ids]
        if stopped and ids[-1] not in policy.eos_ids:
            ids.append(_stop_token(policy, choice))
        return ids, decode(policy, [ids])[0], _server_logp(choice, len(ids)), True
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    counted = choice.get("completion_tokens")
    # transformers serve says `length` of a response whose EOS is its last allowed token, too;
    # and an empty one was an EOS.
    if stopped or not ids or counted == len(ids) + 1:
        ids = [*ids, _stop_token(policy, choice)]
    return ids, text, math.nan, counted == len(ids)


def _stop_token(policy: Policy, choice: dict) -> int:
    """The EOS that ended it: the one that the server names (vLLM: stop_reason, SGLang:
    matched_stop), else the tokenizer's."""
    for key in ("stop_reason", "matched_stop"):
        if choice.get(key) in policy.eos_ids:
            return choice[key]
    eos_id = policy.tokenizer.eos_token_id
    return eos_id if eos_id in policy.eos_ids else policy.eos_ids[0]


def _server_logp(choice: dict, length: int) -> float:
    """Sum of the tokens' log-probabilities; NaN unless there is one for each."""
    logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return (
        float(sum(logps))
        if len(logps) == length and all(isinstance(value, int | float) for value in logps)
        else math.nan
    )


@dataclass(frozen=True)
class ServedSampler:
    """What draws responses on a server; their log-probabilities are computed by `local`, whose
    policy is π_ref as it is loaded here. The server's model has to be the same one."""

    server: CompletionServer
    local: Sampler

    def draw(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """Draw responses as `Sampler.draw` does, with two columns more.

        server_logp: nats, NaN where not given; exact_ids: false where the text had to be tokenized
        again and gave another number of tokens than were drawn.
        """
        policy, ids = self.local.policy, prompts["prompt_id"].tolist()
        choices = self.server.complete(
            policy,
            [self.local.prompt_tokens[pid] for pid in ids],
            responses_per_prompt,
            self.local.settings,
            self.server.model_name(adapter),
            seed,
        )
        drawn, texts, server_logp, exact = map(
            list, zip(*(read_choice(policy, choice) for choice in choices), strict=True)
        )
        rows = [pid for pid in ids for _ in range(responses_per_prompt)]
        tokens = [self.local.prompt_tokens[pid] for pid in rows]
        with attached_adapter(policy, adapter) as model:
            logps = self.local.logps(model, tokens, drawn, adapter)
        table = self.local.table(rows, drawn, texts, logps, source)
        return table.assign(server_logp=np.array(server_logp, dtype=np.float64), exact_ids=exact)
