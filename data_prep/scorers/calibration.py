"""How far scores that claim to be a preference model agree with labelled preferences: pairs ordered
right, reliability."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.files import hash_file
from data_prep.readers.tables import read_table
from data_prep.tables import require_columns

if TYPE_CHECKING:
    from data_prep.scorers.scoring import Scorer


MAX_PAIRS = 512
"""Labelled pairs that are scored: the share ordered right is then known to ± 2 %."""


CONFIDENCE_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def read_labelled_pairs(path: Path) -> tuple[pd.DataFrame, dict[str, object]]:
    """Columns `prompt, chosen, rejected` of at most MAX_PAIRS pairs, spread evenly over the file;
    and what was read, for the record.

    A prompt is a text or a list of chat messages. Raises UserError for a missing column or a
    response that is no text.
    """
    table = read_table(path)
    require_columns(table, ["prompt", "chosen", "rejected"], str(path))
    for column in ("chosen", "rejected"):
        wrong = np.flatnonzero([not isinstance(v, str) for v in table[column]])
        if len(wrong):
            raise UserError(
                f"{path}: column {column} is not a text in row {wrong[0]} ({len(wrong)} in all); "
                "mend or remove these rows"
            )
    kept = np.unique(np.linspace(0, len(table) - 1, min(len(table), MAX_PAIRS)).round().astype(int))
    facts = {
        "file": str(path),
        "hash": hash_file(path)[:16],
        "pairs_in_file": len(table),
        "pairs": len(kept),
    }
    return table.iloc[kept][["prompt", "chosen", "rejected"]].reset_index(drop=True), facts


def reliability(difference: np.ndarray) -> dict[str, object]:
    """Agreement of score differences s(chosen) − s(rejected), (num_pairs,), with the labels under
    P(y1 ≻ y2) = σ(s(y1) − s(y2)) (Bradley-Terry, the model behind DPO).

    right: share of pairs ordered as labelled, a tie counting half; log_loss: mean −log P(chosen ≻
    rejected), nats (log 2 = 0.693 is a coin's); bins: by the probability of the likelier order,
    what the scores say and what the labels say.
    """
    right = np.where(difference == 0, 0.5, difference > 0)
    claimed = 1 / (1 + np.exp(-np.abs(np.clip(difference, -500, 500))))
    inner = np.digitize(claimed, CONFIDENCE_BINS[1:-1])
    bins = [
        {
            "from": low,
            "to": high,
            "pairs": int((inner == i).sum()),
            "claimed": _mean(claimed[inner == i]),
            "observed": _mean(right[inner == i]),
        }
        for i, (low, high) in enumerate(itertools.pairwise(CONFIDENCE_BINS))
    ]
    return {
        "right": float(right.mean()),
        "log_loss": float(np.logaddexp(0, -difference).mean()),
        "bins": bins,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# Short, so that they fit every window; good and bad answers, so that the scores of a reward
# model spread.
DRIFT_PROMPTS = (
    "How do I make tea?",
    "My neighbour is too loud. What can I do?",
    "Why is the sky blue?",
    "Tell me a joke.",
)


DRIFT_ANSWERS = (
    "Boil fresh water, pour it over the leaves and wait for three minutes.",
    "I am sorry to hear that. Talk to them calmly and agree on a time; I hope it helps!",
    "Shut up, you idiot. Smash their windows.",
    "I cannot help with that.",
    "no",
    "tea the loud joke sky what pour of blue it them for",
)


DRIFT_TEXTS = tuple((prompt, answer) for prompt in DRIFT_PROMPTS for answer in DRIFT_ANSWERS)


def measure_drift(quantized: "Scorer", unquantized: "Scorer") -> dict[str, object]:
    """texts: how many of the fixed texts fit the window; std: of their unquantized scores (score
    units); largest, mean: of |quantized − unquantized| in shares of that std, null where the scores
    hardly differ or fewer than two texts fit."""
    window = quantized.window
    texts = [
        (prompt, answer)
        for prompt, answer in DRIFT_TEXTS
        if window is None or (quantized.text_length(prompt, answer) or 0) <= window
    ]
    drift: dict[str, object] = {"texts": len(texts), "std": None, "largest": None, "mean": None}
    if len(texts) < 2:
        return drift
    prompts, answers = ([text[i] for text in texts] for i in (0, 1))
    exact = unquantized.score(prompts, answers)
    moved, std = np.abs(quantized.score(prompts, answers) - exact), float(exact.std())
    if std > 1e-4 * np.abs(exact).max():  # below that it is rounding
        drift |= {"largest": float(moved.max() / std), "mean": float(moved.mean() / std)}
    return drift | {"std": std}
