"""The keys of the recipe's `objective` block: the constrained problem."""

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from constrained_dpo.kinds import MEAN, Measure
from constrained_dpo.problem import Constraint
from data_prep.scorers.settings import ScorerSettings
from data_prep.settings import Settings
from data_prep.tables import CATEGORY_MARK, PROMPTS

STD = "std"


DEFAULT_TAIL = 0.05
"""The share of the scores that is their tail."""


DEFAULT = "default"
"""The margin of categories that are not named."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class RewardSettings(Settings):
    """The objective that is maximized."""

    name: Name = Field(description="column name of the reward")
    scorer: ScorerSettings = Field(description="what scores it")


class ConstraintSettings(Settings):
    """A utility (higher is better) and the level it has to reach, in its own score units."""

    name: Name = Field(
        description="column name of the utility, and the constraint's name everywhere"
    )
    kind: Literal["mean", "tail", "rate"] = Field(
        "mean",
        description="what is constrained: the mean of the scores; `tail`, the mean of the lowest "
        "`level` of them (NAME.tail); `rate`, the share of answers that score at least `at` "
        "(NAME.rate)",
    )
    level: float | None = Field(
        None, gt=0, lt=1, description="with kind tail: the share that is the tail; null: 0.05"
    )
    at: float | None = Field(
        None, description="with kind rate: the lowest score that counts, in score units"
    )
    by: str | None = Field(
        None,
        description="a column of the prompts' sources that holds a prompt's categories (a text, a "
        "list of texts, or a mapping from category to true or false): one constraint and one "
        "multiplier, NAME.CATEGORY, for each of them",
    )
    min_prompts: int = Field(
        8,
        ge=2,
        description="with `by`: a category with fewer dual or fewer test prompts is pooled with "
        "the other small ones as `other`",
    )
    margin: float | str | dict[str, float | str] | None = Field(
        None,
        description="b: at least so much above the reference policy; a number, or 0.5std: in std "
        "of π_ref's scores on the dual prompts; with `by` also by category, {weapons: 1.0, "
        "default: 0.3}",
    )
    threshold: float | None = Field(
        None, description="c: at least this, absolutely (instead of margin)"
    )
    categories: dict[str, list[str]] | None = Field(
        None, description="written by `prepare`: the categories of `by`, each by its name"
    )
    reference_std: float | None = Field(
        None, gt=0, description="written by `prepare`: what 1std of `margin` is in score units"
    )
    scorer: ScorerSettings = Field(description="what scores it")

    @field_validator("margin", mode="before")
    @classmethod
    def _numbers_or_std(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: cls._number_or_std(level) for name, level in value.items()}
        return None if value is None else cls._number_or_std(value)

    @classmethod
    def _number_or_std(cls, value: object) -> float | str:
        text = "" if isinstance(value, bool) else str(value)
        in_std = isinstance(value, str) and text.endswith(STD)
        try:
            number = float(text.removesuffix(STD) if in_std else text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"it is {value!r}; write a finite number, or a number of standard deviations such "
                "as 0.5std"
            )
        return f"{number:.12g}{STD}" if in_std else number

    @model_validator(mode="after")
    def _kind_has_its_keys(self) -> "ConstraintSettings":
        if self.level is not None and self.kind != "tail":
            raise ValueError(f"level: is of a tail, and kind is {self.kind}; drop one of them")
        if (self.at is None) == (self.kind == "rate"):
            raise ValueError(
                "at: kind rate needs the lowest score that counts"
                if self.kind == "rate"
                else f"at: is of a rate, and kind is {self.kind}; drop one of them"
            )
        levels = self.margin.values() if isinstance(self.margin, dict) else [self.margin]
        if self.kind == "rate" and any(isinstance(level, str) for level in levels):
            raise ValueError("margin: a rate's is a share, such as 0.02, not a number in std")
        return self

    @model_validator(mode="after")
    def _by_category(self) -> "ConstraintSettings":
        if self.by is None:
            default = type(self).model_fields["min_prompts"].default
            alone = {
                "min_prompts": self.min_prompts != default,
                "categories": bool(self.categories),
            }
            alone["margin: by category"] = isinstance(self.margin, dict)
            if wrong := [key for key, given in alone.items() if given]:
                raise ValueError(f"{', '.join(wrong)}: of constraints by category; give `by` too")
            return self
        if self.by in (*PROMPTS, "token_ids"):
            raise ValueError(f"by: {self.by} is a column of the prompts table; name another")
        if self.margin == {}:
            raise ValueError("margin: it is empty; give a number, or one for each category")
        if not isinstance(self.margin, dict) or self.categories is None:
            return self
        unknown = [n for n in self.margin if n not in (*self.categories, DEFAULT)]
        missing = [n for n in self.categories if n not in self.margin]
        if unknown or (missing and DEFAULT not in self.margin):
            raise ValueError(
                f"margin: {'there is no category ' + ', '.join(unknown) if unknown else ''}"
                f"{'; ' if unknown and missing else ''}"
                f"{'no margin for ' + ', '.join(missing) if missing else ''}; the categories are "
                f"{', '.join(self.categories)}, and `default` is of those that are not named"
            )
        return self

    def margin_of(self, category: str) -> float | str | None:
        """The margin of a category; before the categories are known, of any."""
        if not isinstance(self.margin, dict):
            return self.margin
        return self.margin.get(category, self.margin.get(DEFAULT, next(iter(self.margin.values()))))

    @property
    def margins_in_std(self) -> dict[str, float]:
        """The numbers of standard deviations of the margins that are in std, by constraint."""
        names = self.categories or [""]
        margins = {f"{CATEGORY_MARK}{n}" if n else "": self.margin_of(n) for n in names}
        return {
            f"{self.name}{end}{self._suffix}": float(margin.removesuffix(STD))
            for end, margin in margins.items()
            if isinstance(margin, str)
        }

    @property
    def constraints(self) -> list[Constraint]:
        """One, or with `by` one for each category once they are known; with margins in std in score
        units, where their number is known."""
        if self.by is None or self.categories is None:
            name = f"{self.name}{self._suffix}"
            return [replace(self._constraint(name, self.margin_of("")), by=self.by)]
        return [
            replace(
                self._constraint(
                    f"{self.name}{CATEGORY_MARK}{name}{self._suffix}", self.margin_of(name)
                ),
                utility=self.name,
                by=self.by,
                categories=frozenset(members),
            )
            for name, members in self.categories.items()
        ]

    def _constraint(self, name: str, margin: float | str | None) -> Constraint:
        if not isinstance(margin, str):
            return Constraint(name, margin, self.threshold, measure=self._measure)
        in_std = float(margin.removesuffix(STD))
        if self.reference_std is None or self.threshold is not None:
            return Constraint(
                name, threshold=self.threshold, margin_in_std=in_std, measure=self._measure
            )
        return Constraint(name, margin=in_std * self.reference_std, measure=self._measure)

    @property
    def _measure(self) -> Measure:
        if self.kind == "mean":
            return MEAN
        return Measure(self.kind, DEFAULT_TAIL if self.level is None else self.level, self.at)

    @property
    def _suffix(self) -> str:
        return "" if self.kind == "mean" else f"{CATEGORY_MARK}{self.kind}"


class ObjectiveSettings(Settings):
    """The constrained problem."""

    beta: float = Field(
        gt=0, description="β: price of a nat of KL to the reference policy, in reward units"
    )
    reward: RewardSettings = Field(description="the reward")
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="KL to the reference policy that is aimed at, in nats, by solving for κ in "
        "fit.conditional.kappa; null: β is what beta says",
    )
    constraints: list[ConstraintSettings] = Field(
        description="the utilities; [] is single-reward DPO"
    )
