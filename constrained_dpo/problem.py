"""The constrained problem (P) and its sign convention: u > 0 is satisfied with room, u < 0 is
violated, λ ← [λ − ηu]_+.

    maximize   E_x[ E_{y~π} r(x,y) − β KL(π(·|x) ‖ π_ref(·|x)) ]
    subject to E_x[ E_{y~π} g_i(x,y) − E_{y~π_ref} g_i(x,y) ] ≥ b_i   (margin)
            or E_x E_{y~π} g_i ≥ c_i   (threshold)

Source: the constrained alignment problem of CAID, arXiv:2505.19387. Utilities are
higher-is-better; a cost enters negated, once, at its scorer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from constrained_dpo.kinds import MEAN, Measure
from data_prep.errors import UserError
from data_prep.tables import CATEGORY_MARK, RESERVED_NAMES


def by_name(values: pd.Series) -> dict[str, float]:
    """Give a Series by constraint name as plain numbers."""
    return {str(name): float(value) for name, value in values.items()}


@dataclass(frozen=True)
class Constraint:
    """A utility, the column `name`, and the level it has to reach: `margin` above the reference
    policy, or an absolute `threshold` (score units).

    margin_in_std: a margin in standard deviations of the reference policy's scores, until they are
    known. utility: the column that is scored, where the constraint is on the prompts
    of some categories only, those in column `by` that are in `categories`; all means are then over
    these prompts. Source of constraints by category: Cat-DPO, arXiv:2604.17299.
    measure: the mean, or a tail or rate, whose names are COLUMN.tail and COLUMN.rate.
    """

    name: str
    margin: float | None = None
    threshold: float | None = None
    margin_in_std: float | None = None
    utility: str | None = None
    by: str | None = None
    categories: frozenset[str] = frozenset()
    measure: Measure = MEAN

    def __post_init__(self) -> None:
        levels = [v for v in (self.margin, self.threshold, self.margin_in_std) if v is not None]
        if len(levels) != 1:
            raise UserError(
                f"constraint {self.name}: give exactly one of margin (over the reference) and "
                "threshold (absolute)"
            )
        if not np.isfinite(levels[0]):
            raise UserError(
                f"constraint {self.name}: its level is {levels[0]}; give a finite number"
            )

    @property
    def scored(self) -> str:
        """The scorer's column that it is about."""
        return self.utility or self.column

    @property
    def column(self) -> str:
        """The column of a responses table with its scores; by category null for other prompts."""
        if self.measure.kind == "mean":
            return self.name
        return self.name.removesuffix(f"{CATEGORY_MARK}{self.measure.kind}")

    @property
    def block(self) -> str:
        """The block of a family that serves it: its own, or by category the one of its utility and
        measure for all categories."""
        return self.name if self.utility is None else self.utility + self.name[len(self.column) :]

    def values(self, responses: pd.DataFrame) -> np.ndarray:
        """Compute the values whose mean is constrained, (num_responses,)."""
        return self.measure.values(responses[self.column].to_numpy(np.float64))

    def at_tail_of(
        self, responses: pd.DataFrame, weights: np.ndarray | None = None
    ) -> "Constraint":
        """Give the constraint on a tail at the quantile of these responses; others as they are.

        weights: (num_responses,); None: every prompt counts alike.
        """
        scores = responses[self.column].to_numpy(np.float64)
        if weights is None:
            measure = self.measure.at_tail_by_prompt(scores, responses["prompt_id"])
        else:
            measure = self.measure.at_tail_of(scores, weights)
        return replace(self, measure=measure)

    def at(self, level: float) -> "Constraint":
        """Give the same constraint with another margin, or threshold where it has one (score
        units)."""
        if self.threshold is None:
            return replace(self, margin_in_std=None, margin=level)
        return replace(self, threshold=level)

    def concerns(self, prompts: pd.DataFrame) -> pd.Series:
        """Tell which prompts it is about, (num_prompts,) bool; prompts: rows of the prompts table
        with its categories."""
        if self.by is None:
            return pd.Series(True, index=prompts.index)
        return prompts[self.by].map(lambda names: not self.categories.isdisjoint(names))


def _measured(constraint: Constraint) -> str:
    """What of a score is constrained, as a formula with its words."""
    column, measure = constraint.column, constraint.measure
    if measure.kind == "tail":
        return f"E[{column}] over its lowest {100 * measure.share:g} %"
    if measure.kind == "rate":
        return f"P({column} ≥ {measure.at:g})"
    return f"E[{column}]"


def _listed(categories: frozenset[str]) -> str:
    return " or ".join(sorted(categories)) or "each category in turn"


@dataclass(frozen=True)
class ConstrainedProblem:
    """Maximize `reward`, the name of a column, less `beta` · KL (score units per nat), subject to
    `constraints`. Raises UserError on duplicated or reserved names."""

    reward: str
    beta: float
    constraints: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not self.beta > 0 or not np.isfinite(self.beta):
            raise UserError(f"beta is {self.beta}; it must be a finite number > 0")
        names = [self.reward, *self.names]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"objective name {name} is used twice; give every reward and constraint its "
                    "own name"
                )
            if name in RESERVED_NAMES:
                raise UserError(f"objective name {name} is a reserved column name; choose another")

    @property
    def names(self) -> list[str]:
        """Constraint names, in the order of every λ, u and margin Series."""
        return [c.name for c in self.constraints]

    @property
    def objectives(self) -> list[str]:
        """Score columns: the reward, then the utilities."""
        return [self.reward, *self.names]

    def prompt_counts(self, prompts: pd.DataFrame) -> pd.DataFrame:
        """Count the prompts that each constraint concerns, by constraint and split; prompts: the
        prompts table."""
        counts = {
            c.name: prompts["split"][c.concerns(prompts)].value_counts() for c in self.constraints
        }
        splits = ["fit", "dual", "test"]
        table = pd.DataFrame(counts, index=splits, dtype=float).T
        return table.fillna(0).astype(int)

    @property
    def columns(self) -> list[str]:
        """The columns of a responses table that the problem rests on: the reward's, then those of
        the utilities' scores."""
        return list(dict.fromkeys([self.reward, *(c.column for c in self.constraints)]))

    def scores(self, responses: pd.DataFrame) -> pd.DataFrame:
        """Give the responses with the columns of all objectives: those of tails and rates are
        computed from their scores, tails at the problem's points.

        Raises ValueError for a tail whose point is not set.
        """
        derived = {c.name: c.values(responses) for c in self._transformed}
        return responses.assign(**derived) if derived else responses

    def reference_scores(self, reference: pd.DataFrame) -> pd.DataFrame:
        """Give π_ref's responses as `scores` does, tails at π_ref's own quantile: their means are
        what a margin is above.

        The quantile maximizes the mean on these responses, so that π_ref's tail is not taken for
        lower than it is.
        """
        return self.at_tails_of(reference).scores(reference)

    @property
    def has_tails(self) -> bool:
        """Whether a constraint is on a tail."""
        return any(c.measure.moves for c in self.constraints)

    def at_tails_of(
        self, responses: pd.DataFrame, weights: np.ndarray | None = None
    ) -> "ConstrainedProblem":
        """Give the problem with its tails at the quantiles of these responses, weights:
        (num_responses,); None: every prompt counts alike."""
        if not self.has_tails:
            return self
        moved = (c.at_tail_of(responses, weights) for c in self.constraints)
        return replace(self, constraints=tuple(moved))

    def with_tail_shares(self, factor: float) -> "ConstrainedProblem":
        """Give the problem with tails of `factor` times their shares, at most a half."""
        moved = (
            replace(c, measure=replace(c.measure, share=min(0.5, factor * c.measure.share)))
            if c.measure.moves
            else c
            for c in self.constraints
        )
        return replace(self, constraints=tuple(moved))

    @property
    def tail_points(self) -> dict[str, float]:
        """The points of the tails that are set, by constraint (score units)."""
        tails = (c for c in self.constraints if c.measure.moves)
        return {c.name: c.measure.at for c in tails if c.measure.at is not None}

    def with_tail_points(self, points: Mapping[str, float]) -> "ConstrainedProblem":
        """Give the problem with tails at these points, by constraint; those that are not named stay
        where they are."""
        moved = (
            replace(c, measure=replace(c.measure, at=points[c.name])) if c.name in points else c
            for c in self.constraints
        )
        return replace(self, constraints=tuple(moved))

    @property
    def _transformed(self) -> list[Constraint]:
        return [c for c in self.constraints if c.measure.kind != "mean"]

    def with_categories(self, scored: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
        """Add the columns of constraints by category: the utility's score, null for responses to
        prompts that the constraint does not concern.

        scored: a responses table with the scorers' columns (a utility that is not among them gives
        none); prompts: the prompts table.
        """
        for c in self.constraints:
            if c.utility is not None and c.utility in scored:
                concerned = set(prompts["prompt_id"][c.concerns(prompts)])
                scores = scored[c.utility].where(scored["prompt_id"].isin(concerned))
                scored = scored.assign(**{c.column: scores})
        return scored

    @property
    def relative(self) -> pd.Series:
        """True where the constraint is a margin over the reference, by constraint."""
        return pd.Series({c.name: c.threshold is None for c in self.constraints}, dtype=bool)

    @property
    def unresolved(self) -> dict[str, float]:
        """Margins that are in standard deviations still, by constraint."""
        return {c.name: c.margin_in_std for c in self.constraints if c.margin_in_std is not None}

    @property
    def bounds(self) -> pd.Series:
        """b_i or c_i, by constraint (score units). Raises ValueError while a margin is in standard
        deviations."""
        if self.unresolved:
            raise ValueError(
                f"the margin of {', '.join(self.unresolved)} is in std still; pass the recipe "
                "that `prepare` returned"
            )
        return pd.Series(
            {c.name: c.margin if c.margin is not None else c.threshold for c in self.constraints},
            dtype=float,
        )

    def levels(self, reference_means: pd.Series) -> pd.Series:
        """a_i: the utility to reach, ḡ_ref,i + b_i (margin) or c_i (threshold), by constraint."""
        return self.bounds + reference_means.reindex(self.names).where(self.relative, 0.0)

    def multipliers(self, values: dict[str, float] | pd.Series) -> pd.Series:
        """A λ Series in constraint order; raises UserError on unknown or missing names and on
        values that are not finite and ≥ 0."""
        given = pd.Series(values, dtype=float)
        unknown = [str(n) for n in given.index if n not in self.names]
        missing = [n for n in self.names if n not in given.index]
        if unknown or missing:
            raise UserError(
                f"lambda: {'unknown ' + ', '.join(unknown) + '; ' if unknown else ''}"
                f"{'missing ' + ', '.join(missing) + '; ' if missing else ''}the constraints are "
                f"{', '.join(self.names) or '(none)'}"
            )
        given = given.reindex(self.names)
        bad = given.index[~(np.isfinite(given) & (given >= 0))]
        if len(bad):
            raise UserError(
                f"lambda of {bad[0]} is {given[bad[0]]}; multipliers are finite and ≥ 0"
            )
        return given

    def describe(self) -> str:
        """Say the problem in words, signs and units included."""
        lines = [f"maximize E[{self.reward}] − {self.beta:g}·KL(π‖π_ref)"]
        for c in self.constraints:
            if c.margin_in_std is not None:
                level = f"at least {c.margin_in_std:g} std of π_ref's scores above π_ref"
            else:
                level = (
                    f"at least {c.threshold:g}"
                    if c.margin is None
                    else f"at least {c.margin:g} above π_ref"
                )
            where = "" if c.by is None else f" over prompts whose {c.by} is {_listed(c.categories)}"
            lines.append(
                f"subject to {_measured(c)}{where} {level} (higher is better; u > 0 is satisfied "
                "with room)"
            )
        return "\n".join(lines)
