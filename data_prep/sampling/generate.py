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
from data_prep.sampling.decoding import draw_tokens
from data_prep.sampling.draws import DrawLaw
from data_prep.sampling.law import SamplingSettings, generation_arguments
from data_prep.sampling.logprobs import SampledLogps, sampled_logps
from data_prep.sampling.prompt_cache import PromptRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    policy: Policy,
    model: "PreTrainedModel",
    prompts: list[list[int]],
    settings: SamplingSettings,
    seed: int,
) -> list[list[int]]:
    """One response (token ids, EOS included where it ended) per prompt, drawn in one batch with its
    own seed.

    Where the model's cache cannot give up rows, as with recurrent layers, transformers' own
    `generate` draws, under the same law.
    """
    import torch

    rows = PromptRows.of(prompts, policy.tokenizer.pad_token_id, policy.device)
    with torch.no_grad():
        drawn = draw_tokens(model, rows, settings, policy.eos_ids, seed)
        if drawn is not None:
            return drawn
        return _generated(policy, model, rows, settings, seed)


def _generated(
    policy: Policy,
    model: "PreTrainedModel",
    prompts: PromptRows,
    settings: SamplingSettings,
    seed: int,
) -> list[list[int]]:
    """`generate` by transformers. The generation config is complete, so neither the checkpoint's
    own (blanked at loading) nor the library's defaults (top_k = 50) enter."""
    import torch
    from transformers import GenerationConfig

    pad_id = policy.tokenizer.pad_token_id
    config = GenerationConfig(**generation_arguments(settings, policy.eos_ids, pad_id))
    cuda = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=prompts.ids[prompts.rows],
            attention_mask=prompts.mask[prompts.rows],
            generation_config=config,
        )
    return [_cut_at_eos(row, policy.eos_ids) for row in output[:, prompts.width :].tolist()]


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
