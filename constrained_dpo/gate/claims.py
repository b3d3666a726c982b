"""What a gate checks of samples, each claim in one form: a mean over prompts of a number above 0.

The number of a prompt x is its room, a·ḡ_θ(x) + b·ḡ_ref(x) + c: ḡ are means over the responses of
the policy and of π_ref. A margin is (1, −1, −b), a threshold (1, 0, −c), a share that rises by at
most m (−1, 1, m), a length at most ρ times as long (−1, ρ, 0). The claim holds where the mean over
prompts is above 0. Of a tail or a rate ḡ are means of transformed scores (`kinds`). Pure; numpy and
pandas only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from constrained_dpo.estimates.intervals import Interval
from constrained_dpo.estimates.slack import halves
from constrained_dpo.gate.record import check_title
from constrained_dpo.kinds import MEAN, Measure
from data_prep.errors import UserError

TEST = "test"
"""The gate's own set of prompts; other sets are named by their check."""

LENGTH, CUT_OFF = "gate_length", "gate_cut_off"


@dataclass(frozen=True)
class Claim:
    """A check on samples: `policy` ḡ_θ + `reference` ḡ_ref + `offset` > 0 in the mean over prompts.

    kind, name: of the check; words: the claim for a reader; prompts: the set that it is about;
    column: of the responses, or LENGTH, CUT_OFF; range: between which its values lie, infinite
    where nothing bounds them; measure: what of the column is claimed.
    """

    kind: str
    name: str
    words: str
    column: str
    policy: float
    reference: float
    offset: float
    range: Interval = (-np.inf, np.inf)
    prompts: str = TEST
    measure: Measure = MEAN

    @property
    def title(self) -> str:
        """The check's name in reports."""
        return check_title(self.kind, self.name)

    def means(self, responses: pd.DataFrame) -> pd.Series:
        """Compute ḡ of every prompt: (num_prompts,) by prompt_id."""
        scores = column_of(responses, self.column)
        values = pd.Series(self.measure.values(scores.to_numpy()), index=responses.index)
        return values.groupby(responses["prompt_id"], sort=True).mean()

    def at_tail_of(self, responses: pd.DataFrame) -> "Claim":
        """Give a claim on a tail at the quantile of these responses, which maximizes their mean;
        others as they are."""
        scores = column_of(responses, self.column).to_numpy(np.float64)
        measure = self.measure.at_tail_by_prompt(scores, responses["prompt_id"])
        return replace(self, measure=measure)

    def reference_means(self, reference: pd.DataFrame) -> pd.Series:
        """Compute π_ref's ḡ of every prompt, a tail's at its own quantile: (num_prompts,) by
        prompt_id."""
        return self.at_tail_of(reference).means(reference)

    def room(self, samples: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
        """Compute the room of every prompt that the claim concerns: (num_prompts,) by prompt_id.

        samples, reference: responses of π_θ and π_ref to the same prompts. A tail's room is not
        above the tail's own. Raises UserError when the prompts differ.
        """
        after, before = self.means(samples), self.reference_means(reference)
        if not after.index.equals(before.index):
            odd = after.index.symmetric_difference(before.index)
            raise UserError(
                f"{self.title}: {len(odd)} prompts are in only one of the two tables, e.g. "
                f"{odd[0]!r}; remove the gate's folder and give the command again"
            )
        return (self.policy * after + self.reference * before + self.offset).dropna()

    def reference_room(self, reference: pd.DataFrame) -> pd.Series:
        """Compute the room that π_ref has against itself: every other response of a prompt against
        the rest; prompts with one response are left out."""
        return self.room(*halves(reference))

    def bounds(self, seen: Iterable[pd.Series]) -> Interval:
        """Bound the room that a prompt can have: by the range, else by the rooms seen.

        seen: (num_prompts,) rooms of tables at hand.
        """
        low = high = self.offset
        ranges = self.measure.bounds(*self.range), self.measure.reference_bounds(*self.range)
        for factor, range_ in zip((self.policy, self.reference), ranges, strict=True):
            ends = sorted(factor * end for end in range_) if factor else [0.0, 0.0]
            low, high = low + ends[0], high + ends[1]
        values = np.concatenate([np.asarray(rooms, np.float64) for rooms in seen])
        return (
            low if np.isfinite(low) else float(values.min()),
            high if np.isfinite(high) else float(values.max()),
        )

    @property
    def bounded(self) -> bool:
        """Whether the range bounds the room at both ends."""
        return bool(np.isfinite(self.measure.bounds(*self.range)).all())


def column_of(responses: pd.DataFrame, column: str) -> pd.Series:
    """Give a number of every response: a score's column, its length in tokens, whether it was cut
    off."""
    if column == LENGTH:
        return responses["token_ids"].map(len).astype(np.float64)
    if column == CUT_OFF:
        return (~responses["ended"].astype(bool)).astype(np.float64)
    return responses[column].astype(np.float64)
