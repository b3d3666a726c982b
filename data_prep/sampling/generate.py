"""Responses from a policy under an exactly stated law: token ids, text, and log-probabilities by
teacher forcing.

What was sampled is what is scored and trained on: token ids come first and are never re-tokenized;
a response that was cut off gets no EOS.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm import tqdm

from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import Policy
from data_prep.sampling.draws import DrawLaw
from data_prep.sampling.law import SamplingSettings, generation_arguments
from data_prep.sampling.logprobs import SampledLogps, sampled_logps

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


def generate(
    policy: Policy,
    model: "PreTrainedModel",
    prompts: list[list[int]],
    settings: SamplingSettings,
    seed: int,
) -> list[list[int]]:
    """One response (token ids, EOS included where it ended) per prompt, drawn in one batch with its
    own seed.

    The generation config is complete, so neither the checkpoint's own (blanked at loading) nor the
    library's defaults (top_k = 50) enter. A prompt that is asked for several responses is computed
    once (`_prompt_cache`); the law, and but for rounding the draws, stay the same.
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
        cache = (
            _prompt_cache(model, ids, mask, rows)
            if width > 1 and len(numbers) < len(prompts)
            else None
        )
        prefix = {} if cache is None else {"past_key_values": cache}
        output = model.generate(
            input_ids=ids[rows], attention_mask=mask[rows], generation_config=config, **prefix
        )
    return [_cut_at_eos(row, policy.eos_ids) for row in output[:, width:].tolist()]


def _prompt_cache(
    model: "PreTrainedModel", ids: "torch.Tensor", mask: "torch.Tensor", rows: "torch.Tensor"
) -> "DynamicCache | None":
    """Keys and values of all but the last token of prompts padded on the left, ids and mask
    (num_distinct, width), selected by `rows`.

    None where the model keeps anything else of what it has read, as recurrent layers do: `generate`
    then computes every row's prompt.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    read = {
        "input_ids": ids[:, :-1],
        "attention_mask": mask[:, :-1],
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
    }
    cache = getattr(model(**read, use_cache=True, logits_to_keep=1), "past_key_values", None)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if not isinstance(cache, DynamicCache) or any(
        type(layer) not in plain for layer in cache.layers
    ):
        return None
    cache.batch_select_indices(rows)
    return cache


def _cut_at_eos(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """Up to and including the first EOS. Padding behind it goes; a pad token that was itself
    sampled before it stays."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1]
    return tokens


@dataclass(frozen=True)
class Sampler:
    """What draws responses here.

    policy: the loaded base; prompt_tokens: token ids by prompt_id; settings: the sampling law.
    """

    policy: Policy
    prompt_tokens: dict[str, list[int]]
    settings: SamplingSettings

    def draw(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """Draw responses of π_θ (adapter folder) or π_ref (None): num_prompts × K rows.

        A responses table without scores; `response_id` is source/prompt_id/k. Each response gets
        one forward under π_ref and, with an adapter, one under π_θ.
        """
        ids = [pid for pid in prompts["prompt_id"] for _ in range(responses_per_prompt)]
        tokens, size = [self.prompt_tokens[pid] for pid in ids], self.settings.batch_size
        with attached_adapter(self.policy, adapter) as model:
            drawn = []
            # A run commits one batch per shard and shows the shards; only a caller that draws
            # several batches at once needs a bar here.
            hidden = True if len(ids) <= size else None
            for begin in tqdm(
                range(0, len(ids), size), desc="sample", unit="batch", disable=hidden, leave=False
            ):
                batch = tokens[begin : begin + size]
                drawn += generate(self.policy, model, batch, self.settings, seed + begin)
            logps = self.logps(model, tokens, drawn, adapter)
        return self.table(ids, drawn, decode(self.policy, drawn), logps, source)

    def logps(
        self,
        model: "PreTrainedModel",
        tokens: list[list[int]],
        drawn: list[list[int]],
        adapter: Path | None,
        tested: bool = False,
    ) -> SampledLogps:
        """Compute the log-probabilities of responses that the model with that adapter drew.

        tested: with the sums that test draws by others (`data_prep.sampling.draws`).
        """
        settings, eos_ids = self.settings, self.policy.eos_ids if tested else ()
        return sampled_logps(
            model,
            tokens,
            drawn,
            pad_id=self.policy.tokenizer.pad_token_id,
            batch_size=settings.batch_size,
            law=DrawLaw(settings.temperature, settings.top_p, eos_ids),
            reference=None if adapter is None else model.disable_adapter,
        )

    def table(
        self,
        prompt_ids: list[str],
        drawn: list[list[int]],
        texts: list[str],
        logps: SampledLogps,
        source: str,
    ) -> pd.DataFrame:
        """Make the responses table of what was drawn, a prompt's responses side by side."""
        numbers = pd.Series(prompt_ids).groupby(prompt_ids).cumcount()
        names = zip(prompt_ids, numbers, strict=True)
        return pd.DataFrame(
            {
                "prompt_id": prompt_ids,
                "response_id": [f"{source}/{pid}/{k}" for pid, k in names],
                "response": texts,
                "token_ids": [np.array(ids, dtype=np.int32) for ids in drawn],
                "ended": [ids[-1] in self.policy.eos_ids for ids in drawn],
                "source": source,
                "sample_logp": logps.sample,
                "policy_logp": logps.policy,
                "ref_logp": logps.ref,
                "path_kl": logps.path_kl,
            }
        )


def decode(policy: Policy, drawn: list[list[int]]) -> list[str]:
    """Text of responses, special tokens left out."""
    return policy.tokenizer.batch_decode(drawn, skip_special_tokens=True)
