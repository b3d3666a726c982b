"""What every scorer of a recipe can be told about its scores."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from data_prep.settings import Settings


class ScorerOptions(Settings):
    """What every scorer can be told about its scores. Applied by `scoring.apply_options` to what
    the scorer gives and the caches keep."""

    negate: bool = Field(False, description="true for a cost (higher is worse)")
    indicator: float | None = Field(
        None,
        description="t: the score is 1 where it is at least t (after `negate`) and 0 elsewhere, "
        "so its mean is a rate",
    )
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[low, high]: scores outside (after `negate`) become the nearer bound; "
        "`check` and `prepare` say how many",
    )

    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[low, high]: between these all its scores lie (after `negate`), where you "
        "know it; verdicts then hold without assuming anything of unseen prompts. A score outside "
        "is an error",
    )

    @model_validator(mode="after")
    def _one_shape(self) -> "ScorerOptions":
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range is {self.range}; write [low, high] with low < high")
        if self.indicator is not None and self.clip is not None:
            raise ValueError(
                "indicator and clip: give one of them; an indicator's scores are 0 and 1 already"
            )
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip is {self.clip}; write [low, high] with low < high")
        return self

    @property
    def place(self) -> str:
        """Where the scorer is: a file and function, a folder, a hub id, a URL."""
        raise NotImplementedError

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """Models that are loaded, by folder or hub id, each with its revision."""
        return []

    @property
    def raw_range(self) -> tuple[float, float]:
        """What the scorer itself can give, before `negate`; infinite where nothing bounds it."""
        return -math.inf, math.inf

    @property
    def score_range(self) -> tuple[float, float]:
        """Give the range of the scores after all options; infinite where it is not known."""
        if self.indicator is not None:
            return 0.0, 1.0
        low, high = self.raw_range
        if self.negate:
            low, high = -high, -low
        for bounds in (self.range, self.clip):
            if bounds is not None:
                low, high = max(low, bounds[0]), min(high, bounds[1])
        return low, high

    def described(self) -> str:
        """The options that are not at their defaults, in words; empty where all are."""
        words = ["negated"] if self.negate else []
        if self.indicator is not None:
            words.append(f"1 where at least {self.indicator:g}, else 0")
        if self.clip is not None:
            words.append(f"clipped to [{self.clip[0]:g}, {self.clip[1]:g}]")
        if self.range is not None:
            words.append(f"within [{self.range[0]:g}, {self.range[1]:g}]")
        return ", ".join(words)


# Not part of a scorer's fingerprint: the options apply to its scores afterwards, the rest does
# not change them.
OUTSIDE_FINGERPRINT = {
    "model",
    "revision",
    "batch_size",
    "device",
    "allow_pickle",
    *ScorerOptions.model_fields,
}
