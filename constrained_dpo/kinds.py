"""Constraints beyond the mean: a tail and a rate as means of transformed scores.

A *tail* is the mean of a score's lowest share α over prompts and answers (conditional value at
risk): CVaR_α(π) = max_t E_π[t − (t − g)_+/α], reached where t is the lower α-quantile of g. At any
point t the mean is a bound from below, and linear in the policy. Source: R. Rockafellar and S.
Uryasev, Optimization of conditional value-at-risk, Journal of Risk 2, 2000; as a constraint of
alignment: RAD, arXiv:2603.10938. A *rate* is the share of answers whose score is at least `at`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

Kind = Literal["mean", "tail", "rate"]


def tail_scores(scores: np.ndarray, point: float, share: float) -> np.ndarray:
    """Compute t − (t − g)_+/α of every score, same shape, score units; null where g is null.

    point: t, score units; share: α in (0, 1).
    """
    return np.asarray(point - np.maximum(point - scores, 0.0) / share)


def rate_scores(scores: np.ndarray, at: float) -> np.ndarray:
    """Tell by 1 and 0 whether a score is at least `at`, same shape; null where g is null."""
    return np.where(np.isnan(scores), np.nan, scores >= at)


def tail_point(scores: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Find the lower α-quantile of scores: the smallest with at least a share α of the weight at or
    below it, which maximizes the mean of `tail_scores`.

    scores, weights: (num_responses,); a null score has no weight. Raises ValueError where none has
    weight.
    """
    there = ~np.isnan(scores) & (weights > 0)
    if not there.any():
        raise ValueError("no score has weight, so there is no quantile")
    values, order = scores[there], np.argsort(scores[there], kind="stable")
    total = np.cumsum(weights[there][order])
    # a share that is reached up to rounding is reached
    place = int(np.searchsorted(total, share * total[-1] * (1 - 1e-12)))
    return float(values[order][place])


def tail_mean(scores: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Compute CVaR_α: the weighted mean of `tail_scores` at their own `tail_point`, score units."""
    there = ~np.isnan(scores) & (weights > 0)
    point = tail_point(scores, weights, share)
    return float(np.average(tail_scores(scores[there], point, share), weights=weights[there]))


@dataclass(frozen=True)
class Measure:
    """What of a score is constrained: its `mean`, the mean of its lowest `share` (`tail`), or the
    share of answers that score at least `at` (`rate`).

    at: score units; of a tail the point t at which its scores are taken, None until it is set.
    """

    kind: Kind = "mean"
    share: float = 0.05
    at: float | None = None

    @property
    def moves(self) -> bool:
        """Whether it is taken at a point that follows the policy."""
        return self.kind == "tail"

    def values(self, scores: np.ndarray) -> np.ndarray:
        """Compute the values whose mean is constrained, same shape; null where the score is.

        Raises ValueError for a tail whose point is not set.
        """
        if self.kind == "mean":
            return scores
        if self.at is None:
            raise ValueError(
                "the tail's point is not set; pass the recipe of a prepared run (`Run.recipe`)"
            )
        if self.kind == "rate":
            return rate_scores(scores, self.at)
        return tail_scores(scores, self.at, self.share)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """Bound the values by the range of the scores, infinite where nothing does; a tail's at its
        own point, or at any where that is not set."""
        if self.kind == "mean":
            return low, high
        if self.kind == "rate":
            return 0.0, 1.0
        point = high if self.at is None else self.at
        if not np.isfinite([low, point]).all():
            return -np.inf, high
        return point - max(point - low, 0.0) / self.share, high

    def reference_bounds(self, low: float, high: float) -> tuple[float, float]:
        """Bound π_ref's values likewise, whose tail is at a point of its own."""
        return (replace(self, at=None) if self.moves else self).bounds(low, high)

    def at_tail_of(self, scores: np.ndarray, weights: np.ndarray) -> "Measure":
        """Give a tail at the quantile of weighted scores, (num_responses,) each; others as they
        are."""
        if not self.moves:
            return self
        return replace(self, at=tail_point(scores, weights, self.share))

    def at_tail_by_prompt(self, scores: np.ndarray, prompts: pd.Series) -> "Measure":
        """Give a tail at the quantile of the prompts' scores, (num_responses,) each, every prompt
        counting alike; others as they are."""
        if not self.moves:
            return self
        return self.at_tail_of(scores, prompt_weights(prompts, scores))


MEAN = Measure()


def prompt_weights(prompts: pd.Series, scores: np.ndarray) -> np.ndarray:
    """Weigh responses so that every prompt counts alike, (num_responses,): 1 over the number of its
    responses with a score."""
    counted = pd.Series(~np.isnan(scores), index=prompts.index, dtype=float)
    counts = counted.groupby(prompts).transform("sum").to_numpy(np.float64)
    return np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
