"""Responses from a policy under an exactly stated law: token ids, text, and log-probabilities by teacher forcing.

What was sampled is what is scored and trained on: token ids come first and are never re-tokenized; a response that was cut off gets no EOS.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from tqdm import tqdm

from data_prep.policy import Policy, attached_adapter
from data_prep.server_settings import SamplingServer
from data_prep.settings import Settings, UserError

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import DynamicCache


LOGITS_AT_ONCE = 2**26
"""Logits held in float32 at a time where log-probabilities are taken (256 MB)."""


class SamplingSettings(Settings):
    """How responses are drawn. At temperature 1 and top_p 1 the law is the policy itself, and KL and gaps can be estimated."""

    responses_per_prompt: int = Field(8, ge=1, description="responses of π_ref per fit prompt in the pool")
    max_new_tokens: int = Field(256, ge=1, description="a response without EOS after so many tokens is cut off, and says so")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the smallest set of tokens with at least this probability")
    batch_size: int = Field(32, ge=1, description="sequences generated at once; one such batch is one shard, committed whole")
    backend: Literal["hf", "openai"] = Field("hf", description="hf: generated here; openai: by a completions server (vLLM, SGLang, ...)")
    server: SamplingServer | None = Field(None, description="for backend: openai")

    @model_validator(mode="after")
    def _served(self) -> "SamplingSettings":
        if (self.backend == "openai") != (self.server is not None):
            raise ValueError("sampling.server: is what backend: openai needs, and nothing else reads it")
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
    """True where what is sampled is the policy itself (T = 1, no nucleus), so that KL and objective can be estimated."""
    return settings.temperature == 1.0 and settings.top_p == 1.0


def response_logits(model: "torch.nn.Module", prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> "torch.Tensor":
    """Next-token logits at the response positions, shape (batch, longest + 1, vocabulary), the model's dtype.

    Entry [b, j] predicts responses[b][j]; the last one predicts what follows. Prompts are padded on the left and responses on the
    right, so every row's response starts in the same column and logits are computed nowhere else.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    prompt_width, width = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(prompts), prompt_width + width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, prompt_width - len(prompt) : prompt_width + len(response)] = torch.tensor(prompt + response)
        mask[row, prompt_width - len(prompt) : prompt_width + len(response)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        logits_to_keep=width + 1,
        use_cache=False,
    )
    return output.logits[:, -(width + 1) :]


def response_logps(
    model: "torch.nn.Module",
    prompts: list[list[int]],
    responses: list[list[int]],
    *,
    pad_id: int,
    batch_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """log π(response | prompt) at T = 1, and under (temperature, top_p); two arrays of shape (num_responses,), nats, float64.

    The sum runs over the response's own tokens: its EOS where it ended, none where it was cut off. Batches are formed by length; a response
    that was drawn several times for its prompt goes through the model once.
    """
    import torch

    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        places.setdefault((tuple(prompt), tuple(response)), []).append(i)
    distinct = sorted(places, key=lambda pair: len(pair[0]) + len(pair[1]))
    plain, warped = np.empty(len(prompts)), np.empty(len(prompts))
    for begin in range(0, len(distinct), batch_size):
        batch = distinct[begin : begin + batch_size]
        drawn = [list(response) for _, response in batch]
        with torch.no_grad():
            logits = response_logits(model, [list(prompt) for prompt, _ in batch], drawn, pad_id)
            for pair, values in zip(batch, _sequence_logps(logits, drawn, temperature, top_p), strict=True):
                plain[places[pair]], warped[places[pair]] = values
    return plain, warped


def _sequence_logps(logits: "torch.Tensor", responses: list[list[int]], temperature: float, top_p: float) -> np.ndarray:
    """What `response_logps` returns, from `response_logits`; shape (batch, 2). At most LOGITS_AT_ONCE logits are in float32 at a time."""
    import torch

    width, same_law = logits.shape[1] - 1, temperature == 1.0 and top_p == 1.0
    chosen = torch.tensor([r + [-1] * (width - len(r)) for r in responses], device=logits.device)
    size = max(1, LOGITS_AT_ONCE // max(1, width * logits.shape[2]))
    sums = []
    for some, tokens in zip(logits[:, :width].split(size), chosen.split(size), strict=True):
        own = tokens >= 0
        steps, picked = some[own].float(), tokens[own][:, None]
        laws = [steps] if same_law else [steps, _warp(steps, temperature, top_p)]
        found = [law.log_softmax(-1).gather(1, picked)[:, 0].double() for law in laws]
        empty = torch.zeros(tokens.shape, dtype=torch.float64, device=logits.device)
        sums.append(torch.stack([empty.masked_scatter(own, values).sum(dim=1) for values in (found[0], found[-1])], dim=1))
    return torch.cat(sums).cpu().numpy()


def _warp(logits: "torch.Tensor", temperature: float, top_p: float) -> "torch.Tensor":
    """The logits that `generate` samples from, by transformers' own warpers in its order: temperature, then top_p."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if temperature != 1.0:
        logits = TemperatureLogitsWarper(temperature)(None, logits)
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1.0 else logits


def generation_arguments(settings: SamplingSettings, eos_ids: tuple[int, ...], pad_id: int) -> dict[str, object]:
    """A complete generation config: what is left out would come from the checkpoint's own or the library's defaults."""
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


def generate(policy: Policy, model: "torch.nn.Module", prompts: list[list[int]], settings: SamplingSettings, seed: int) -> list[list[int]]:
    """One response (token ids, EOS included where it ended) per prompt, drawn in one batch with its own seed.

    The generation config is complete, so neither the checkpoint's own (blanked at loading) nor the library's defaults (top_k = 50) enter.
    A prompt that is asked for several responses is computed once (`_prompt_cache`); the law, and but for rounding the draws, stay the same.
    """
    import torch
    from transformers import GenerationConfig

    pad_id = policy.tokenizer.pad_token_id
    width = max(map(len, prompts))
    numbers: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in numbers])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in numbers])
    ids, mask, rows = ids.to(policy.device), mask.to(policy.device), rows.to(policy.device)
    config = GenerationConfig(**generation_arguments(settings, policy.eos_ids, pad_id))
    cuda = [policy.device] if policy.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        cache = _prompt_cache(model, ids, mask, rows) if width > 1 and len(numbers) < len(prompts) else None
        known = {} if cache is None else {"past_key_values": cache}
        output = model.generate(input_ids=ids[rows], attention_mask=mask[rows], generation_config=config, **known)
    return [_cut_at_eos(row, policy.eos_ids) for row in output[:, width:].tolist()]


def _prompt_cache(model: "torch.nn.Module", ids: "torch.Tensor", mask: "torch.Tensor", rows: "torch.Tensor") -> "DynamicCache | None":
    """Keys and values of all but the last token of prompts padded on the left, ids and mask (num_distinct, width), selected by `rows`.

    None where the model keeps anything else of what it has read, as recurrent layers do: `generate` then computes every row's prompt.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    read = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]}
    cache = getattr(model(**read, use_cache=True, logits_to_keep=1), "past_key_values", None)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if not isinstance(cache, DynamicCache) or any(type(layer) not in plain for layer in cache.layers):
        return None
    cache.batch_select_indices(rows)
    return cache


def _cut_at_eos(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """Up to and including the first EOS. Padding behind it goes; a pad token that was itself sampled before it stays."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1]
    return tokens


def sample_shard(
    policy: Policy,
    prompts: pd.DataFrame,
    prompt_tokens: dict[str, list[int]],
    settings: SamplingSettings,
    *,
    responses_per_prompt: int,
    adapter: Path | None,
    source: str,
    seed: int,
) -> pd.DataFrame:
    """Responses of π_θ (adapter folder) or π_ref (None) to `prompts`, without scores; a responses table of num_prompts × K rows.

    Each response gets one forward under π_ref and, with an adapter, one under π_θ. `response_id` is source/prompt_id/k.
    """
    rows = [pid for pid in prompts["prompt_id"] for _ in range(responses_per_prompt)]
    tokens = [prompt_tokens[pid] for pid in rows]
    size, pad_id = settings.batch_size, policy.tokenizer.pad_token_id
    law = {"temperature": settings.temperature, "top_p": settings.top_p}
    with attached_adapter(policy, adapter) as model:
        drawn = []
        # A run commits one batch per shard and shows the shards; only a caller that draws several batches at once needs a bar here.
        hidden = True if len(rows) <= size else None
        for begin in tqdm(range(0, len(rows), size), desc="sample", unit="batch", disable=hidden, leave=False):
            drawn += generate(policy, model, tokens[begin : begin + size], settings, seed + begin)
        policy_logp, sample_logp = response_logps(model, tokens, drawn, pad_id=pad_id, batch_size=size, **law)
    return responses_table(policy, rows, tokens, drawn, decode(policy, drawn), policy_logp, sample_logp, settings, adapter, source)


def responses_table(
    policy: Policy,
    prompt_ids: list[str],
    prompt_tokens: list[list[int]],
    drawn: list[list[int]],
    texts: list[str],
    policy_logp: np.ndarray,
    sample_logp: np.ndarray,
    settings: SamplingSettings,
    adapter: Path | None,
    source: str,
) -> pd.DataFrame:
    """The responses table of what was drawn, one row each, responses of a prompt side by side; with an adapter, π_ref's forward."""
    ref_logp = policy_logp
    if adapter is not None:
        pad_id = policy.tokenizer.pad_token_id
        ref_logp, _ = response_logps(policy.model, prompt_tokens, drawn, pad_id=pad_id, batch_size=settings.batch_size)
    number = pd.Series(prompt_ids).groupby(prompt_ids).cumcount()
    return pd.DataFrame(
        {
            "prompt_id": prompt_ids,
            "response_id": [f"{source}/{pid}/{k}" for pid, k in zip(prompt_ids, number, strict=True)],
            "response": texts,
            "token_ids": [np.array(ids, dtype=np.int32) for ids in drawn],
            "ended": [ids[-1] in policy.eos_ids for ids in drawn],
            "source": source,
            "sample_logp": sample_logp,
            "policy_logp": policy_logp,
            "ref_logp": ref_logp,
        }
    )


def decode(policy: Policy, drawn: list[list[int]]) -> list[str]:
    """Text of responses, special tokens left out."""
    return policy.tokenizer.batch_decode(drawn, skip_special_tokens=True)


def check_lengths(prompt_tokens: dict[str, list[int]], settings: SamplingSettings, limit: int, limit_name: str) -> None:
    """Raises UserError naming the longest prompts when prompt + max_new_tokens exceeds `limit` tokens."""
    room = limit - settings.max_new_tokens
    long = sorted((pid for pid, ids in prompt_tokens.items() if len(ids) > room), key=lambda p: -len(prompt_tokens[p]))
    if long:
        raise UserError(
            f"prompts: {len(long)} are longer than {limit_name} {limit} − max_new_tokens {settings.max_new_tokens} = {room} tokens, "
            f"the longest {long[0]} with {len(prompt_tokens[long[0]])}; raise fit.max_length, lower sampling.max_new_tokens or set "
            "prompts.too_long: drop"
        )
