"""Tables of scores from files, and which policy their rows are samples of."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.dual.tails import first_tail_points
from constrained_dpo.problem import ConstrainedProblem
from data_prep.errors import UserError
from data_prep.readers.tables import read_columns

LOG_PROBABILITIES = ("sample_logp", "ref_logp")

SAME_LAW = 1e-3
"""Nats of a response: two log-probabilities nearer than this are the same law's, computed twice."""


@dataclass(frozen=True)
class ScoreFile:
    """table; problem: with its tails at their best points in it; `taken_as`: one line about the
    policy its rows are taken to be samples of, None where its column source says so."""

    table: ScoreTable
    problem: ConstrainedProblem
    taken_as: str | None


def read_scores(
    path: Path,
    problem: ConstrainedProblem,
    assume_reference: bool = False,
    max_lambda: float = 1000.0,
) -> ScoreFile:
    """Read `prompt_id` and the problem's columns; weight rows of another policy by their
    log-probabilities, or refuse them.

    max_lambda: of the search for the tails' points. Rows with a finite `sample_logp` and `ref_logp`
    (nats) that differ get the importance weight π_ref/q, also where `source` says reference:
    another temperature is another law. Without these columns, rows are samples of π_ref where
    `source` starts with "reference", where there is no such column, or with `assume_reference`.
    Raises UserError for other rows, and for a law that does not cover π_ref.
    """
    path = Path(path)
    frame = read_columns(
        path, ["prompt_id", *problem.columns, "source", "response_id", *LOG_PROBABILITIES]
    )
    weight, taken_as = _log_weight(frame, path, assume_reference)
    if weight is None:
        problem = problem.with_tail_points(first_tail_points(frame, problem, max_lambda))
        return ScoreFile(ScoreTable.from_frame(frame, problem), problem, taken_as)
    if problem.has_tails:
        raise UserError(f"{path}: a tail's point needs samples of the reference policy itself")
    table = ScoreTable.from_frame(frame.assign(log_weight=weight), problem, "log_weight")
    return ScoreFile(table, problem, taken_as)


def _log_weight(
    frame: pd.DataFrame, path: Path, assume_reference: bool
) -> tuple[np.ndarray | None, str | None]:
    """log π_ref − log q of every row, None for samples of π_ref, and the line about it."""
    if assume_reference:
        return None, "taken as the reference policy's samples (--assume-reference)"
    logps = [
        pd.to_numeric(frame[n], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        for n in LOG_PROBABILITIES
        if n in frame
    ]
    finite = [np.isfinite(values) for values in logps]
    by_reference = "source" in frame and bool(
        frame["source"].astype(str).str.startswith("reference").all()
    )
    if len(logps) == 2 and all(rows.all() for rows in finite):
        weight = logps[1] - logps[0]
        if by_reference and np.abs(weight).max(initial=0.0) <= SAME_LAW:
            return None, None
        _require_support(weight, path)
        law = "the reference policy's at another temperature" if by_reference else "another policy"
        return weight, (
            f"samples of {law}, weighted by exp(ref_logp − sample_logp), the reference policy's "
            "probability over their sampler's"
        )
    if by_reference:
        return None, None
    need = (
        "finite sample_logp and ref_logp in every row (they are then weighted), or "
        "--assume-reference"
    )
    if "source" in frame:
        raise UserError(
            f"{path}: holds responses that are not the reference policy's (column source); keep "
            f"only those, or give {need}"
        )
    if any(rows.any() for rows in finite):
        raise UserError(f"{path}: sample_logp and ref_logp are not known in every row; give {need}")
    return None, "no column source: taken as the reference policy's samples"


def _require_support(weight: np.ndarray, path: Path) -> None:
    """Raises UserError for a truncated law (top_p, top_k): it never draws answers that π_ref gives,
    and no weight makes up for them. Every answer that it draws is likelier than under π_ref, while
    a law that covers π_ref draws some that are less likely."""
    if weight.max(initial=0.0) <= SAME_LAW and weight.min(initial=0.0) < -SAME_LAW:
        covered = 100 * float(np.exp(weight).mean())
        raise UserError(
            f"{path}: its responses were drawn from a truncated law (top_p or top_k), which covers "
            f"about {covered:.0f} % of the reference policy; sample with top_p 1, or take them as "
            "the policy's own with --assume-reference"
        )
