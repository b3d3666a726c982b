"""Scores as the dual function takes them: `ScoreTable`, prompts × responses in blocks. numpy only.

D(λ) ≈ β E_x log mean_k exp((r + λ·g)/β + log π_ref(y_k) − log q(y_k)) − λ·a, y_k ~ q; one function
for every q (for q = π_ref it is MoCAN's dual function, arXiv:2405.19544). Convex in λ: gradient E_x
E_w[g] − a, Hessian (1/β) E_x Cov_w(g), with w the tilted weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from constrained_dpo.problem import ConstrainedProblem
from data_prep.errors import UserError
from data_prep.tables import (
    CATEGORY_MARK,
    require_columns,
    require_ids,
    require_scores,
    score_values,
)

BLOCK_ROWS = (
    1 << 15
)  # rows of one block of an evaluation: its temporaries (about 2 MB) stay in a core's cache


@dataclass(frozen=True)
class Block:
    """Whole prompts of a table: slices of its rows and prompts. With K responses each, arrays are
    (prompts, K); ragged ones are flat."""

    rows: slice
    prompts: slice
    width: int | None
    starts: np.ndarray
    counts: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """The block's part of a (num_responses,) array, contiguous."""
        chosen = np.ascontiguousarray(values[self.rows])
        return chosen.reshape(-1, self.width) if self.width else chosen

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values.sum(axis=1) if self.width else np.add.reduceat(values, self.starts)

    def dot(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Sums of products per prompt. Neither branch calls BLAS, whose rounding may depend on
        alignment and threads."""
        return (
            np.einsum("ij,ij->i", left, right)
            if self.width
            else np.add.reduceat(left * right, self.starts)
        )

    def max(self, values: np.ndarray) -> np.ndarray:
        return values.max(axis=1) if self.width else np.maximum.reduceat(values, self.starts)

    def spread(self, per_prompt: np.ndarray) -> np.ndarray:
        """A value per prompt, in a shape that broadcasts against the block's arrays."""
        return per_prompt[:, None] if self.width else np.repeat(per_prompt, self.counts)


@dataclass(frozen=True)
class ScoreTable:
    """Scores sorted by prompt; ragged numbers of responses allowed.

    reward: (num_responses,); utilities: (num_responses, m), both in score units, fastest with
    contiguous columns; log_weight: (num_responses,) log π_ref − log q in nats (0 for samples of
    π_ref); starts: (num_prompts,) first row of each prompt; counts: (num_prompts,); concerned: (m,
    num_prompts) bool, which prompts a utility concerns (elsewhere it is 0); None: all. tail_gain:
    (m, num_prompts), by how much π_ref's mean at its own quantile is above that of `utilities`,
    whose tails are at the problem's points; None: no tail above π_ref's.
    """

    reward: np.ndarray
    utilities: np.ndarray
    log_weight: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    concerned: np.ndarray | None = None
    tail_gain: np.ndarray | None = None

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, problem: ConstrainedProblem, log_weight: str | None = None
    ) -> "ScoreTable":
        """From a responses table; `log_weight` names a column of log π_ref − log q, None means q =
        π_ref. Raises UserError for a tail above π_ref's in weighted samples."""
        weights = [log_weight] if log_weight else []
        columns = problem.objectives + weights
        require_columns(frame, ["prompt_id", *problem.columns, *weights], "scores")
        require_ids(frame, ["prompt_id"], "scores")
        require_scores(frame, problem.columns + weights, "scores")
        given, frame = frame, problem.scores(frame)
        codes, _ = pd.factorize(frame["prompt_id"])
        values = [score_values(frame, c) for c in columns]
        utilities = np.array(values[1 : 1 + len(problem.names)]).reshape(
            len(problem.names), len(frame)
        )
        table = cls.from_columns(codes, values[0], utilities, values[-1] if log_weight else None)
        if any(c.measure.moves and c.threshold is None for c in problem.constraints):
            if log_weight:
                raise UserError(
                    "a tail above the reference policy's needs that policy's own samples; give a "
                    "threshold instead of a margin"
                )
            rise = problem.reference_scores(given)[problem.names] - frame[problem.names]
            gain = rise.groupby(codes).mean().fillna(0.0)  # by code, as the table
            table = replace(table, tail_gain=gain.to_numpy(np.float64).T)
        if not any(CATEGORY_MARK in name for name in problem.names):
            return table
        concerned = frame[problem.names].notna().groupby(codes).first().to_numpy().T
        return table if concerned.all() else replace(table, concerned=concerned)

    @classmethod
    def from_columns(
        cls,
        codes: np.ndarray,
        reward: np.ndarray,
        utilities: np.ndarray,
        log_weight: np.ndarray | None = None,
    ) -> "ScoreTable":
        """reward, log_weight: (num_responses,); utilities: (m, num_responses); codes:
        (num_responses,) a number for each row's prompt, equal where the prompt is. Where the rows
        of every prompt follow each other nothing is copied."""
        if not (codes[1:] >= codes[:-1]).all():
            order = np.argsort(codes, kind="stable")  # a prompt's rows keep their order
            codes, reward, utilities = codes[order], reward[order], utilities[:, order]
            log_weight = None if log_weight is None else log_weight[order]
        starts = np.concatenate([[0], np.flatnonzero(codes[1:] != codes[:-1]) + 1])
        return cls(
            reward=reward,
            utilities=utilities.T,
            log_weight=_no_weight(len(codes)) if log_weight is None else log_weight,
            starts=starts,
            counts=np.diff(starts, append=len(codes)),
        )

    @classmethod
    def from_arrays(
        cls, reward: np.ndarray, utilities: np.ndarray, log_weight: np.ndarray | None = None
    ) -> "ScoreTable":
        """K responses to every prompt. reward, log_weight: (num_prompts, K); utilities: (m,
        num_prompts, K). Nothing is copied."""
        prompts, width = reward.shape
        return cls(
            reward=reward.reshape(-1),
            utilities=utilities.reshape(len(utilities), -1).T,
            log_weight=_no_weight(reward.size) if log_weight is None else log_weight.reshape(-1),
            starts=np.arange(prompts) * width,
            counts=np.full(prompts, width),
        )

    @cached_property
    def width(self) -> int | None:
        """K where every prompt has the same number of responses, else None."""
        return int(self.counts[0]) if (self.counts == self.counts[0]).all() else None

    def blocks(self, block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """The table in blocks of whole prompts with about `block_rows` rows each, at least one
        prompt."""
        ends, first = self.starts + self.counts, 0
        while first < len(ends):
            row = int(self.starts[first])
            last = max(int(np.searchsorted(ends, row + block_rows, side="right")), first + 1)
            prompts = slice(first, last)
            yield Block(
                slice(row, int(ends[last - 1])),
                prompts,
                self.width,
                self.starts[prompts] - row,
                self.counts[prompts],
            )
            first = last

    def take(self, prompts: np.ndarray, responses: np.ndarray | None = None) -> "ScoreTable":
        """The table of some prompts (numbers of prompts; one may come twice), with all their
        responses or the rows marked True in `responses`, (num_responses,) bool, at least one of
        each prompt."""
        counts = self.counts[prompts]
        rows = np.repeat(
            self.starts[prompts] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts
        ) + np.arange(counts.sum())
        codes = np.repeat(np.arange(len(prompts)), counts)
        if responses is not None:
            codes, rows = codes[responses[rows]], rows[responses[rows]]
        table = ScoreTable.from_columns(
            codes, self.reward[rows], self.utilities.T[:, rows], self.log_weight[rows]
        )
        concerned, gain = (
            None if column is None else column[:, prompts]
            for column in (self.concerned, self.tail_gain)
        )
        return replace(table, concerned=concerned, tail_gain=gain)

    @property
    def shares(self) -> np.ndarray:
        """Share of the prompts that each utility concerns, (m,)."""
        if self.concerned is None:
            return np.ones(self.utilities.shape[1])
        return np.asarray(self.concerned.mean(axis=1))

    def levels(self, problem: ConstrainedProblem) -> pd.Series:
        """a_i by the table's own means of π_ref, over the prompts that each constraint concerns."""
        return problem.levels(pd.Series(self.reference_means(), index=problem.names))

    def prompt_means(self, values: np.ndarray) -> np.ndarray:
        """Mean over a prompt's responses, unweighted; (num_responses, ...) → (num_prompts, ...)."""
        sums = np.add.reduceat(values, self.starts, axis=0)
        counts = self.counts.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray(sums / counts)

    def within_covariance(self, left: np.ndarray, right: np.ndarray) -> float:
        """Covariance of two scores within prompts, (num_responses,) each, pooled over prompts.

        The part of their spread that a policy can move: what differs between prompts only, no
        multiplier reaches. Σ_x Σ_k (a − ā_x)(c − c̄_x) / Σ_x (K_x − 1); 0 where no prompt has two
        responses.
        """
        free = len(left) - len(self.counts)
        product = 0.0
        for block in self.blocks():
            one, other = (
                values - block.spread(block.sum(values) / block.counts)
                for values in (block.of(left), block.of(right))
            )
            product += float(block.dot(one, other).sum())
        return product / free if free else 0.0

    def within_std(self, values: np.ndarray) -> float:
        """Standard deviation within prompts of scores (num_responses,), score units."""
        return float(np.sqrt(self.within_covariance(values, values)))

    def prompt_reference_means(self) -> np.ndarray:
        """Mean utilities of π_ref by prompt, (m, num_prompts): plain means of samples of π_ref,
        self-normalised importance-weighted means Σ w g / Σ w, w = π_ref/q, of weighted ones; of
        tails at π_ref's own quantile."""
        means = np.empty((self.utilities.shape[1], len(self.counts)))
        for block in self.blocks():
            weight = block.of(self.log_weight)
            weight = np.exp(weight - block.spread(block.max(weight)))
            total = block.sum(weight)
            for mean, column in zip(means, self.utilities.T, strict=True):
                mean[block.prompts] = block.dot(weight, block.of(column)) / total
        return means if self.tail_gain is None else means + self.tail_gain

    def reference_means(self) -> np.ndarray:
        """ḡ_ref, shape (m,): the mean of `prompt_reference_means` over the prompts that a utility
        concerns."""
        return np.asarray(self.prompt_reference_means().mean(axis=1) / self.shares)

    def within_spread(self) -> np.ndarray:
        """Standard deviation of the utilities within the prompts that they concern, (m,)."""
        spread = np.array([self.within_std(column) for column in self.utilities.T])
        return np.asarray(spread / np.sqrt(self.shares))


def _no_weight(rows: int) -> np.ndarray:
    return np.broadcast_to(0.0, rows)  # rows zeros in the memory of one
