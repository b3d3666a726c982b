"""Log-probabilities of responses by teacher forcing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.sampling.draws import DrawLaw, draw_terms
from data_prep.sampling.prompt_cache import PromptRows, contiguous_head
from data_prep.tables import DRAWS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

POLICY_LAW = DrawLaw()


LOGITS_AT_ONCE = 2**26
"""Logits held in float32 at a time where log-probabilities are taken (256 MB)."""


def response_logits(
    model: "PreTrainedModel", prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> "torch.Tensor":
    """Next-token logits at the response positions, shape (batch, longest + 1, vocabulary), the
    model's dtype.

    Entry [b, j] predicts responses[b][j]; the last one predicts what follows. Prompts are padded on
    the left and responses on the right, so every row's response starts in the same column and
    logits are computed nowhere else. A prompt of several responses is read once.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    rows, width = PromptRows.of(prompts, pad_id, device), max(map(len, responses))
    follows = [response + [pad_id] * (width - len(response)) for response in responses]
    present = [[1] * len(response) + [0] * (width - len(response)) for response in responses]
    # of texts without a response the tables are empty, and torch would make floats of them
    integers = {"dtype": torch.long, "device": device}
    ids = torch.cat([rows.ids[rows.rows], torch.tensor(follows, **integers)], dim=1)
    mask = torch.cat([rows.mask[rows.rows], torch.tensor(present, **integers)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    repeated = rows.width > 1 and len(rows.ids) < len(prompts)
    read = rows.read(model, rows.width - 1) if repeated else None
    first = 0 if read is None else rows.width - 1
    cache = {"use_cache": False} if read is None else {"past_key_values": read[0]}
    with contiguous_head(model):
        output = model(
            input_ids=ids[:, first:],
            attention_mask=mask,
            position_ids=positions[:, first:],
            logits_to_keep=width + 1,
            **cache,
        )
    return output.logits[:, -(width + 1) :]


@dataclass(frozen=True)
class SampledLogps:
    """Of responses that a policy drew, (num_responses,) each, nats, float64.

    policy: log π at T = 1; sample: under the sampling law; ref: log π_ref; path_kl: Σ_t
    KL(π(·|y_<t) ‖ π_ref(·|y_<t)) over the response's tokens, whose mean over samples of π is
    KL(π‖π_ref) with far less noise than that of log π/π_ref (Amini et al., Better Estimation of the
    KL Divergence Between Language Models, arXiv:2504.10637). draws: the sums that test the draws
    (`data_prep.sampling.draws`), by column; empty where the law names no EOS.
    """

    policy: np.ndarray
    sample: np.ndarray
    ref: np.ndarray
    path_kl: np.ndarray
    draws: dict[str, np.ndarray]


def sampled_logps(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    responses: list[list[int]],
    *,
    pad_id: int,
    batch_size: int,
    law: DrawLaw = POLICY_LAW,
    reference: "Callable[[], AbstractContextManager[Any]] | None" = None,
) -> SampledLogps:
    """Compute the log-probabilities of responses that `model` drew.

    law: what it drew them from; reference: makes the model π_ref for a while (PEFT's
    `disable_adapter`); None: it is π_ref, so that ref is policy and path_kl is 0. The sum runs over
    the response's own tokens: its EOS where it ended, none where it was cut off. Batches are formed
    so that few tokens are computed; a response that was drawn several times for its prompt goes
    through the model once.
    """
    import torch

    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        places.setdefault((tuple(prompt), tuple(response)), []).append(i)
    values = np.empty((len(prompts), 4 + len(DRAWS) * bool(law.eos_ids)))
    size = batch_size if reference is None else max(1, batch_size // 2)  # two logits at a time
    for batch in _cheapest_batches(list(places), size):
        asked, drawn = ([list(pair[k]) for pair in batch] for k in (0, 1))
        with torch.no_grad():
            logits = response_logits(model, asked, drawn, pad_id)
            other = None
            if reference is not None:
                with reference():
                    other = response_logits(model, asked, drawn, pad_id)
            sums = _sequence_sums(logits, other, drawn, law)
        for pair, row in zip(batch, sums, strict=True):
            values[places[pair]] = row
    policy, sample, ref, path_kl = values.T[:4]
    draws = dict(zip(DRAWS, values.T[4:], strict=False))  # none without an EOS
    return SampledLogps(policy, sample, ref, path_kl, draws)


Pair = tuple[tuple[int, ...], tuple[int, ...]]


def _cheapest_batches(pairs: list[Pair], size: int) -> list[list[Pair]]:
    """Batches of (prompt, response): responses of one prompt together, or of one length, whichever
    computes fewer tokens."""
    orders = (
        sorted(pairs, key=lambda pair: (len(pair[0]), pair[0], len(pair[1]))),
        sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0]))),
    )
    ways = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]
    return min(ways, key=lambda batches: sum(map(_tokens_computed, batches)))


def _tokens_computed(batch: list[Pair]) -> int:
    """Of each distinct prompt once and of every response, with their padding."""
    prompts = {prompt for prompt, _ in batch}
    read = len(prompts) * max(map(len, prompts))
    return read + len(batch) * max(len(response) for _, response in batch)


def response_logps(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    responses: list[list[int]],
    *,
    pad_id: int,
    batch_size: int,
) -> np.ndarray:
    """Compute log π(response | prompt) at T = 1 by teacher forcing, (num_responses,) nats, as
    `sampled_logps` does."""
    return sampled_logps(model, prompts, responses, pad_id=pad_id, batch_size=batch_size).policy


def _sequence_sums(
    logits: "torch.Tensor",
    reference: "torch.Tensor | None",
    responses: list[list[int]],
    sampling: DrawLaw,
) -> np.ndarray:
    """`SampledLogps` as columns, (batch, 4 or 9), from `response_logits`. At most LOGITS_AT_ONCE
    logits are in float32 at a time."""
    import torch

    width = logits.shape[1] - 1
    chosen = torch.tensor([r + [-1] * (width - len(r)) for r in responses], device=logits.device)
    size = max(1, LOGITS_AT_ONCE // max(1, width * logits.shape[2]))
    sums = []
    for begin in range(0, len(responses), size):
        rows = slice(begin, begin + size)
        tokens, present = chosen[rows], chosen[rows] >= 0
        picked = tokens[present][:, None]

        def gathered(law: "torch.Tensor", picked: "torch.Tensor" = picked) -> "torch.Tensor":
            return law.gather(1, picked)[:, 0].double()

        steps = logits[rows, :width][present].float()
        law = steps.log_softmax(-1)
        policy = gathered(law)
        drawn_from = law if sampling.is_policy else sampling.logps(steps)
        sample = policy if sampling.is_policy else gathered(drawn_from)
        ref, path_kl = policy, torch.zeros_like(policy)
        if reference is not None:
            other = reference[rows, :width][present].float().log_softmax(-1)
            ref = gathered(other)
            path_kl = torch.nn.functional.kl_div(other, law, reduction="none", log_target=True)
            path_kl = path_kl.sum(-1).double()
        empty = torch.zeros(tokens.shape, dtype=torch.float64, device=logits.device)
        columns = [policy, sample, ref, path_kl]
        if sampling.eos_ids:
            columns += draw_terms(drawn_from, tokens[present], sampling.eos_ids).unbind(1)
        sums.append(torch.stack([empty.masked_scatter(present, c).sum(1) for c in columns], dim=1))
    return torch.cat(sums).cpu().numpy()
