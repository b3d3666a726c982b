"""The sampling law: the keys of the recipe's `sampling` block, its identity, the complete
generation config."""

import hashlib
import json
from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_prep.errors import UserError
from data_prep.http import RequestSettings
from data_prep.settings import Settings
from data_prep.urls import check_urls


class SamplingServer(RequestSettings):
    """A completions server that draws the responses; log-probabilities are still computed here."""

    base_url: str | list[str] = Field(
        description="e.g. http://localhost:8000/v1; $NAME: the environment variable's value, for "
        "servers that move; a list (or commas in the variable): servers of the same model, which "
        "share the work"
    )
    model: str = Field(description="the name it serves policy.model under")
    kind: Literal["vllm", "sglang", "transformers", "openai"] = Field(
        "vllm",
        description="which server: decides the fields sent and how a round's adapter gets there; "
        "openai: any other",
    )
    adapter_model: str | None = Field(
        None,
        description="model name of a round's adapter, with {path} or {name}, where the server "
        "needs no loading call",
    )
    shard_size: int = Field(
        512, ge=1, description="responses asked for at once; one shard, committed whole"
    )
    tolerance: float = Field(
        0.1,
        gt=0,
        description="nats per response by which the server's law may differ from the policy "
        "before the certificate is null",
    )

    rounding: float | None = Field(
        None,
        gt=0,
        description="nats per token (root mean square) by which the server's log-probabilities may "
        "differ from the policy's before its draws are refused; null: by the policy's dtype, 0.002 "
        "in float32, 0.016 in float16, 0.125 in bfloat16, and 0.5 where it is quantized",
    )

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str | list[str]) -> str | list[str]:
        return check_urls(url)

    @field_validator("adapter_model")
    @classmethod
    def _holds_the_adapter(cls, pattern: str | None) -> str | None:
        if pattern is not None and "{path}" not in pattern and "{name}" not in pattern:
            raise ValueError(
                "needs {path} or {name}, or every round would be sampled from the same model"
            )
        return pattern

    @model_validator(mode="after")
    def _reachable_adapters(self) -> "SamplingServer":
        if self.kind in ("transformers", "openai") and self.adapter_model is None:
            raise ValueError(
                f"kind: {self.kind} has no call that loads a round's adapter; set adapter_model, "
                "the name that the server finds it under"
            )
        return self


class SamplingSettings(Settings):
    """How responses are drawn from the policy. At temperature 1 and top_p 1 the law is the policy
    itself (at `policy.temperature`), and KL and gaps can be estimated."""

    responses_per_prompt: int = Field(
        0,
        ge=0,
        description="responses of π_ref per fit prompt in the pool; 0: about 3,000 in all, 8 to 64",
    )
    max_new_tokens: int = Field(
        256, ge=1, description="a response without EOS after so many tokens is cut off, and says so"
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="divides the policy's logits once more, behind policy.temperature; other than "
        "1 what is drawn is not the policy, and KL, objective and certificate are null: set "
        "policy.temperature for a policy that is deployed at another temperature",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus: the smallest set of tokens with at least this probability",
    )
    batch_size: int = Field(
        32,
        ge=1,
        description="sequences generated at once; one such batch is one shard, committed whole",
    )
    backend: Literal["hf", "openai"] = Field(
        "hf", description="hf: generated here; openai: by a completions server (vLLM, SGLang, ...)"
    )
    server: SamplingServer | None = Field(None, description="for backend: openai")

    @model_validator(mode="after")
    def _served(self) -> "SamplingSettings":
        if (self.backend == "openai") != (self.server is not None):
            raise ValueError(
                "sampling.server: is what backend: openai needs, and nothing else reads it"
            )
        return self

    @property
    def shard_size(self) -> int:
        """Responses that are drawn and committed together."""
        return self.batch_size if self.server is None else self.server.shard_size


def law_hash(settings: SamplingSettings, eos_ids: tuple[int, ...]) -> str:
    """Identity of a sampling law: estimates under different hashes are not comparable."""
    law = [settings.temperature, settings.top_p, settings.max_new_tokens, sorted(eos_ids)]
    if settings.server is not None:  # without one as before there were any
        law += [settings.backend, settings.server.kind]
    return hashlib.sha256(json.dumps(law).encode()).hexdigest()[:16]


def is_policy_law(settings: SamplingSettings) -> bool:
    """True where what is sampled is the policy itself (no temperature beside its own, no nucleus),
    so that KL and objective can be estimated."""
    return settings.temperature == 1.0 and settings.top_p == 1.0


def generation_arguments(
    settings: SamplingSettings, eos_ids: tuple[int, ...], pad_id: int
) -> dict[str, object]:
    """A complete generation config: what is left out would come from the checkpoint's own or the
    library's defaults."""
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": None,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": list(eos_ids),
        "pad_token_id": pad_id,
    }


def check_lengths(
    prompt_tokens: dict[str, list[int]], settings: SamplingSettings, limit: int, limit_name: str
) -> None:
    """Raises UserError naming the longest prompts when prompt + max_new_tokens exceeds `limit`
    tokens."""
    room = limit - settings.max_new_tokens
    long = sorted(
        (pid for pid, ids in prompt_tokens.items() if len(ids) > room),
        key=lambda p: -len(prompt_tokens[p]),
    )
    if long:
        raise UserError(
            f"prompts: {len(long)} are longer than {limit_name} {limit} − max_new_tokens "
            f"{settings.max_new_tokens} = {room} tokens, "
            f"the longest {long[0]} with {len(prompt_tokens[long[0]])}; raise fit.max_length, "
            "lower sampling.max_new_tokens or set "
            "prompts.too_long: drop"
        )
