"""Log-probabilities of responses by teacher forcing."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


LOGITS_AT_ONCE = 2**26
"""Logits held in float32 at a time where log-probabilities are taken (256 MB)."""


def response_logits(
    model: "PreTrainedModel", prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> "torch.Tensor":
    """Next-token logits at the response positions, shape (batch, longest + 1, vocabulary), the
    model's dtype.

    Entry [b, j] predicts responses[b][j]; the last one predicts what follows. Prompts are padded on
    the left and responses on the right, so every row's response starts in the same column and
    logits are computed nowhere else.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    prompt_width, width = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(prompts), prompt_width + width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, prompt_width - len(prompt) : prompt_width + len(response)] = torch.tensor(
            prompt + response
        )
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
    """log π(response | prompt) at T = 1, and under (temperature, top_p); two arrays of shape
    (num_responses,), nats, float64.

    The sum runs over the response's own tokens: its EOS where it ended, none where it was cut off.
    Batches are formed by length; a response that was drawn several times for its prompt goes
    through the model once.
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
            for pair, values in zip(
                batch, _sequence_logps(logits, drawn, temperature, top_p), strict=True
            ):
                plain[places[pair]], warped[places[pair]] = values
    return plain, warped


def _sequence_logps(
    logits: "torch.Tensor", responses: list[list[int]], temperature: float, top_p: float
) -> np.ndarray:
    """What `response_logps` returns, from `response_logits`; shape (batch, 2). At most
    LOGITS_AT_ONCE logits are in float32 at a time."""
    import torch

    width, same_law = logits.shape[1] - 1, temperature == 1.0 and top_p == 1.0
    chosen = torch.tensor([r + [-1] * (width - len(r)) for r in responses], device=logits.device)
    size = max(1, LOGITS_AT_ONCE // max(1, width * logits.shape[2]))
    sums = []
    for rows, tokens in zip(logits[:, :width].split(size), chosen.split(size), strict=True):
        present = tokens >= 0
        steps, picked = rows[present].float(), tokens[present][:, None]
        laws = [steps] if same_law else [steps, _warp(steps, temperature, top_p)]
        values = [law.log_softmax(-1).gather(1, picked)[:, 0].double() for law in laws]
        empty = torch.zeros(tokens.shape, dtype=torch.float64, device=logits.device)
        both = (values[0], values[-1])
        sums.append(torch.stack([empty.masked_scatter(present, v).sum(dim=1) for v in both], dim=1))
    return torch.cat(sums).cpu().numpy()


def _warp(logits: "torch.Tensor", temperature: float, top_p: float) -> "torch.Tensor":
    """The logits that `generate` samples from, by transformers' own warpers in its order:
    temperature, then top_p."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if temperature != 1.0:
        logits = TemperatureLogitsWarper(temperature)(None, logits)
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1.0 else logits
