"""The constrained problem (P) and its sign convention: u > 0 is satisfied with room, u < 0 is
violated, λ ← [λ − ηu]_+.

    maximize   E_x[ E_{y~π} r(x,y) − β KL(π(·|x) ‖ π_ref(·|x)) ]
    subject to E_x[ E_{y~π} g_i(x,y) − E_{y~π_ref} g_i(x,y) ] ≥ b_i   (margin)
            or E_x E_{y~π} g_i ≥ c_i   (threshold)

Source: the constrained alignment problem of CAID, arXiv:2505.19387. Utilities are
higher-is-better; a cost enters negated, once, at its scorer.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.tables import RESERVED_NAMES


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
    """

    name: str
    margin: float | None = None
    threshold: float | None = None
    margin_in_std: float | None = None
    utility: str | None = None
    by: str | None = None
    categories: frozenset[str] = frozenset()

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
        return self.utility or self.name

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
                scored = scored.assign(**{c.name: scores})
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
                f"subject to E[{c.name}]{where} {level} (higher is better; u > 0 is satisfied with "
                "room)"
            )
        return "\n".join(lines)
