"""Responses drawn token by token. Rows leave the batch when they have ended, prompts are read once,
and a draw costs one uniform number in place of one for every token of the vocabulary."""

from typing import TYPE_CHECKING

from data_prep.sampling.draws import DrawLaw
from data_prep.sampling.law import SamplingSettings
from data_prep.sampling.prompt_cache import PromptRows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

COMPACTED_AT = 0.8
"""The share of rows still open below which the others leave the batch: each time copies the
cache."""


def draw_tokens(
    model: "PreTrainedModel",
    prompts: PromptRows,
    settings: SamplingSettings,
    eos_ids: tuple[int, ...],
    seed: int,
) -> list[list[int]] | None:
    """Draw one response for each row of the prompts: its tokens, EOS included where it ended.

    Position t of row i is the quantile of a uniform number u[i, t] under the law of the next token
    (`inverse_cdf`), so a row's draws do not depend on which rows are still open. None where the
    model's cache cannot give up rows (`PromptRows.read`).
    """
    import torch

    read = prompts.read(model, prompts.width)
    if read is None:
        return None
    cache, logits = read
    count, device = len(prompts.rows), prompts.ids.device
    uniforms = torch.rand(
        (count, settings.max_new_tokens),
        generator=torch.Generator().manual_seed(seed % 2**63),
        dtype=torch.float64,
    ).to(device)
    ends = torch.tensor(eos_ids, device=device)
    drawn = torch.full((count, settings.max_new_tokens), -1, device=device)
    rows = torch.arange(count, device=device)  # of the batch, as numbers of responses
    is_open = torch.ones(count, dtype=torch.bool, device=device)
    mask = prompts.mask[prompts.rows]
    sampled = DrawLaw(settings.temperature, settings.top_p)
    for position in range(settings.max_new_tokens):
        law = sampled.logps(logits.float()).exp()
        tokens = inverse_cdf(law, uniforms[rows, position])
        drawn[rows[is_open], position] = tokens[is_open]
        is_open = is_open & ~torch.isin(tokens, ends)
        num_open = int(is_open.sum())
        if not num_open or position == settings.max_new_tokens - 1:
            break
        if num_open < COMPACTED_AT * len(rows):
            kept = is_open.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, tokens, mask = rows[kept], tokens[kept], mask[kept]
            is_open = is_open[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = _next_logits(model, tokens, mask, cache)
    return [[token for token in row if token >= 0] for row in drawn.tolist()]


def _next_logits(
    model: "PreTrainedModel", tokens: "torch.Tensor", mask: "torch.Tensor", cache: "DynamicCache"
) -> "torch.Tensor":
    """Logits behind one more token of every row, (num_rows, vocabulary)."""
    output = model(
        input_ids=tokens[:, None],
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1]


def inverse_cdf(law: "torch.Tensor", uniforms: "torch.Tensor") -> "torch.Tensor":
    """The first token at which the cumulated law exceeds u times its whole: (num_rows,) draws from
    the law's rows, (num_rows, vocabulary); uniforms: (num_rows,) in [0, 1), float64.

    A token of probability 0 is never drawn.
    """
    import torch

    cumulated = law.cumsum(-1, dtype=torch.float64)
    whole = cumulated[:, -1:]
    below = torch.nextafter(whole, torch.zeros_like(whole))  # u · whole may round up to the whole
    target = torch.minimum(uniforms[:, None] * whole, below)
    return torch.searchsorted(cumulated, target, right=True)[:, 0]
