"""A prompt with its K responses in one sequence: the prompt is computed once, each response sees it
and itself only.

Layout of a row: prompt without its last token | last prompt token, response 1 | last prompt token,
response 2 | ... The last prompt token is repeated because it predicts every response's first token.
Positions restart after the shared part, so a response's keys, queries and positions are those it
has alone, and its log-probability is the same number. That holds where attention obeys a mask and
nothing else carries state from token to token; `why_not_shared` measures it on the model at hand.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.rows import UNSCORED, labels_of, padded, row_lengths
from data_prep.models.temperature import divided
from data_prep.sampling.logprobs import LOGITS_AT_ONCE, response_logps

ROWS_TRIED = 2


SHARED_INPUTS = ("input_ids", "position_ids", "segments", "next_tokens")


@dataclass
class SharedPromptCollator:
    """Rows in the layout above, padded on the right: input_ids, position_ids, segments,
    next_tokens, each (num_rows, length).

    segments: 0 the shared part, k the k-th response, −1 padding. next_tokens: the response token
    that a position predicts.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        segments: list[list[int]] = []
        targets: list[list[int]] = []
        for example in examples:
            *shared, last = example["prompt_ids"]
            start = len(shared)
            row, place, owner, target = (
                list(shared),
                list(range(start)),
                [0] * start,
                [UNSCORED] * start,
            )
            for number, response in enumerate(example["responses_ids"], 1):
                row += [last, *response[:-1]]
                place += range(start, start + len(response))
                owner += [number] * len(response)
                target += response
            ids.append(row)
            positions.append(place)
            segments.append(owner)
            targets.append(target)
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "position_ids": padded(positions, 0),
            "segments": padded(segments, -1),
            "next_tokens": padded(targets, UNSCORED),
            **labels_of(examples),
        }


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive attention mask (num_rows, 1, length, length): 0 where the query may see the key, the
    dtype's least number elsewhere.

    A position sees earlier positions (and itself) of the shared part and of its own response.
    Additive, because eager attention adds it.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    allowed = ((key == 0) | (key == query)) & (order[None, :] <= order[:, None])
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )[:, None]


def add_shared_forward(model: PreTrainedModel, gates: Gates | None = None) -> None:
    """Lets `model(..., segments=, next_tokens=, num_responses=K)` return log π of each response
    (num_rows, K), nats; other calls stay as they are.

    Inside the model's forward, so that wrappers (PEFT, DDP, FSDP) see an ordinary call. gates: of a
    conditional fit; the head sees tokens and no rows, so it is told whose each token is.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(self, *args, segments=None, next_tokens=None, num_responses=0, **kwargs):
        if segments is None:
            return original(*args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "labels"}
        kwargs |= {"attention_mask": block_mask(segments, self.dtype), "use_cache": False}
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        scored = next_tokens != UNSCORED
        layer = self.get_output_embeddings()

        def head(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return divided(self, _gated_head(layer, gates, states, rows))

        logps = _token_logps(
            head,
            layer.get_parameter("weight").shape[0],
            hidden[scored],
            scored.nonzero()[:, 0],
            next_tokens[scored],
        )
        table = logps.new_zeros(segments.shape).masked_scatter(scored, logps)
        return torch.stack(
            [(table * (segments == k)).sum(dim=1) for k in range(1, num_responses + 1)], dim=1
        )

    model.forward = types.MethodType(forward, model)


def _gated_head(
    head: torch.nn.Module, gates: Gates | None, states: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Logits of tokens that lie side by side; rows: (num_tokens,) the row of the batch of each."""
    if gates is None:
        return head(states)
    with gates.by_token(rows):
        return head(states)


def _token_logps(
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    vocabulary: int,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """log softmax(head(hidden))[token], shape (num_tokens,), float32.

    At most LOGITS_AT_ONCE logits exist at a time; more are computed piece by piece, and again in
    the backward pass.
    """

    def piece(states: torch.Tensor, owners: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(head(states, owners).float(), chosen, reduction="none")

    size = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(hidden) <= size:
        return piece(hidden, rows, tokens)
    parts = zip(hidden.split(size), rows.split(size), tokens.split(size), strict=True)
    return torch.cat([checkpoint(piece, *part, use_reentrant=False) for part in parts])


def adapted_head_logps(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """log π of the responses of padded rows (num_sequences,), nats, through the model's own
    forward, so through a LoRA layer on its head.

    TRL's fused head reads the head's weight and would leave the adapter on it out. Logits exist in
    columns that hold a response.
    """
    following = labels[:, 1:]
    columns = (following != UNSCORED).any(dim=0).nonzero()[:, 0]
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=columns
    ).logits
    chosen = following[:, columns]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), chosen.flatten(), reduction="none", ignore_index=UNSCORED
    )
    return -losses.view(chosen.shape).sum(dim=1)


def costs(
    prompts: np.ndarray, responses: np.ndarray, config: PretrainedConfig
) -> tuple[float, float]:
    """(shared, padded) work of a pass over rows of these lengths (`row_lengths`): a layer's
    multiplications ÷ 2·hidden, without the head.

    A token costs about 12·hidden² in a layer's matrices, a pair of positions 2·hidden in its
    attention, seen or masked: together 6·hidden·Σ length + Σ length². Many long responses to a
    short prompt cost more in one sequence than each alone.
    """
    matrices = 6.0 * config.get_text_config().hidden_size
    alone = prompts[:, None] + responses
    together = alone.sum(axis=1) - (prompts - 1) * (responses.shape[1] - 1)
    work = [
        float(matrices * lengths.sum() + (lengths.astype(float) ** 2).sum())
        for lengths in (together, alone)
    ]
    return work[0], work[1]


def why_not_shared(
    model: PreTrainedModel, rows: datasets.Dataset, pad_token_id: int, tolerance: float
) -> str | None:
    """None where the layout is exact on the longest rows of the dataset and cheaper than padded
    rows; else the reason.

    Compared are log π of every response of a few rows in both layouts, `tolerance` in nats per
    token: attention kernels that take no mask, sliding windows shorter than a row, recurrent layers
    and heads with more than a matrix show here, without a list of names. And the last response's
    log-probability must not move at all when the others change: what it cannot see cannot change
    it.
    """
    prompts, responses = row_lengths(rows)
    shared, alone = costs(prompts, responses, model.config)
    if shared >= alone:
        return f"one sequence per row would cost {shared / alone:.2f} times the padded sequences"
    few = [
        rows[int(i)]
        for i in np.argsort(-prompts - responses.max(axis=1), kind="stable")[:ROWS_TRIED]
    ]
    sequences = [(row["prompt_ids"], response) for row in few for response in row["responses_ids"]]
    with evaluating(model), torch.no_grad():
        expected = response_logps(
            model,
            *map(list, zip(*sequences, strict=True)),
            pad_id=pad_token_id,
            batch_size=len(sequences),
        )
        try:
            logps, disturbed = (
                _shared_logps(model, batch, pad_token_id) for batch in (few, _others_changed(few))
            )
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            NotImplementedError,
            IndexError,
            KeyError,
        ) as error:
            return (
                f"the model refuses it ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''})"
            )
    lengths = np.array([len(response) for _, response in sequences])
    difference = float(np.max(np.abs(logps.ravel() - expected) / lengths))
    if not difference <= tolerance:
        return (
            f"log-probabilities differ from padded rows by {difference:.2g} nats per token "
            f"(tolerance {tolerance:.2g})"
        )
    if not np.array_equal(logps[:, -1], disturbed[:, -1]):
        return "a response's log-probability depends on the other responses of its row"
    return None


def _shared_logps(model: PreTrainedModel, rows: list[dict], pad_token_id: int) -> np.ndarray:
    batch = SharedPromptCollator(pad_token_id)(rows)
    device = model.get_input_embeddings().weight.device
    inputs = {name: batch[name].to(device) for name in SHARED_INPUTS}
    return model(**inputs, num_responses=len(rows[0]["responses_ids"])).double().cpu().numpy()


def _others_changed(rows: list[dict]) -> list[dict]:
    """The rows with every response but the last reversed: the same shapes, other contents."""
    return [
        row | {"responses_ids": [*(r[::-1] for r in others), last]}
        for row in rows
        for *others, last in [row["responses_ids"]]
    ]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
