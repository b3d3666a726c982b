"""gate.yaml: what a policy must show before it is released. Typed and frozen like the recipe;
unknown keys are errors; all errors are shown at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from constrained_dpo.gate.refusals import PHRASES
from constrained_dpo.recipe.load import load_settings
from constrained_dpo.recipe.objective import Name
from data_prep.scorers.settings import ScorerSettings
from data_prep.settings import LocalPath, Settings


class ConstraintCheck(Settings):
    """One constraint of the run."""

    name: Name = Field(description="the constraint's name in the recipe")
    level: float | None = Field(
        None,
        description="its margin, or its threshold where the recipe has one; null: the recipe's",
    )


class RewardCheck(Settings):
    """The reward is kept: its mean falls by at most `drop` against the reference policy."""

    drop: float = Field(0.0, description="m, in score units; a negative number demands a gain")


class SecondOpinionCheck(Settings):
    """A scorer that training never saw, against the reference policy. Give one of `no_worse_by` and
    `better_by`."""

    name: Name = Field(description="names the score in tables and reports")
    scorer: ScorerSettings = Field(description="what scores it, higher is better; as in a recipe")
    no_worse_by: float | None = Field(
        None, ge=0, description="m: the mean falls by at most m (score units)"
    )
    better_by: float | None = Field(
        None, ge=0, description="m: the mean rises by at least m (score units)"
    )
    prompts: LocalPath | None = Field(
        None, description="prompts of its own, e.g. of a capability; null: the gate's"
    )

    @model_validator(mode="after")
    def _one_claim(self) -> "SecondOpinionCheck":
        if (self.no_worse_by is None) == (self.better_by is None):
            raise ValueError("give one of no_worse_by and better_by")
        if self.scorer.type == "column":
            raise ValueError("scorer: a column scorer cannot score fresh samples")
        return self

    @property
    def demanded(self) -> float:
        """The least change that passes (score units)."""
        return self.better_by if self.no_worse_by is None else -self.no_worse_by  # type: ignore


class RefusalCheck(Settings):
    """Over-refusal: the share of refusals on prompts that ask for nothing bad rises by at most
    `increase` against the reference policy."""

    prompts: LocalPath = Field(description="file of benign prompts, in the recipe's format")
    increase: float = Field(0.0, ge=0, lt=1, description="m, as a share: 0.03 is three points")
    phrases: list[str] = Field(
        list(PHRASES),
        min_length=1,
        description="a response that begins with one of them, or holds one in its first 200 "
        "characters, is a refusal; so is an empty one",
    )
    scorer: ScorerSettings | None = Field(
        None,
        description="instead of phrases: a guard whose scores lie in [0, 1], 1 for a refusal (set "
        "`indicator`)",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> "RefusalCheck":
        if self.scorer is None:
            return self
        if "phrases" in self.model_fields_set:
            raise ValueError("give phrases or scorer, not both")
        low, high = self.scorer.score_range
        if low < 0 or high > 1:
            raise ValueError(
                "scorer: a refusal is 1 and an answer 0; set indicator, e.g. indicator: 0.5"
            )
        return self


class LengthCheck(Settings):
    """Mean length in tokens, against the reference policy's. Give one of `ratio` and `increase`."""

    ratio: float | None = Field(None, gt=0, description="at most so many times as long")
    increase: float | None = Field(None, description="longer by at most so many tokens")

    @model_validator(mode="after")
    def _one_claim(self) -> "LengthCheck":
        if (self.ratio is None) == (self.increase is None):
            raise ValueError("give one of ratio and increase")
        return self


class CutOffCheck(Settings):
    """Share of responses cut off at `sampling.max_new_tokens`. Give one of `share` and
    `increase`."""

    share: float | None = Field(None, ge=0, lt=1, description="at most this share of responses")
    increase: float | None = Field(
        None, ge=0, lt=1, description="at most so much more than the reference policy's share"
    )

    @model_validator(mode="after")
    def _one_claim(self) -> "CutOffCheck":
        if (self.share is None) == (self.increase is None):
            raise ValueError("give one of share and increase")
        return self


class CapabilityCheck(Settings):
    """A metric of lm-evaluation-harness before (the reference policy) and after (this policy): it
    falls by at most `drop`."""

    task: str = Field(description="the task's name in the results, e.g. gsm8k")
    metric: str = Field(description="the metric with its filter, e.g. exact_match,strict-match")
    before: LocalPath = Field(description="results_*.json of the reference policy")
    after: LocalPath = Field(description="results_*.json of the policy that is judged")
    drop: float = Field(0.0, ge=0, description="tolerated drop, in the metric's units")

    @property
    def name(self) -> str:
        """The task and its metric."""
        return f"{self.task}/{self.metric}"


class ChecksSettings(Settings):
    """What is checked. Every check is against the reference policy; null leaves one out."""

    constraints: Literal["all"] | list[ConstraintCheck] = Field(
        "all", description="`all` constraints of the run at their levels, or a list of blocks"
    )
    reward: RewardCheck | None = Field(None, description="the reward is kept")
    second_opinion: list[SecondOpinionCheck] = Field(
        [], description="scorers that training never saw"
    )
    refusal: RefusalCheck | None = Field(None, description="over-refusal")
    length: LengthCheck | None = Field(None, description="length of the responses")
    cut_off: CutOffCheck | None = Field(None, description="share of responses cut off")
    capability: list[CapabilityCheck] = Field([], description="results of another tool")


class GateSettings(Settings):
    """A gate."""

    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="a policy that fails any check passes the whole gate with at most 1 minus this",
    )
    prompts: LocalPath | None = Field(
        None, description="file of prompts, in the recipe's format; null: the run's test prompts"
    )
    size: int | None = Field(
        None, ge=2, description="prompts without `--until-decided`; null: all there are"
    )
    responses: int | None = Field(
        None, ge=1, description="responses per prompt; null: the recipe's dual.responses_per_prompt"
    )
    seed: int = Field(0, ge=0, description="another seed draws other responses")
    checks: ChecksSettings = Field(default_factory=ChecksSettings, description="what is checked")

    @model_validator(mode="after")
    def _consistent(self) -> "GateSettings":
        names = [check.name for check in self.checks.second_opinion]
        names += [check.name for check in self.checks.capability]
        if isinstance(self.checks.constraints, list):
            names += [check.name for check in self.checks.constraints]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"checks: {', '.join(twice)} stands there twice; name each once")
        return self


GateSource = Path | str | Mapping[str, Any] | GateSettings
"""A gate's file, its content as a mapping, or its settings."""


def load_gate(source: GateSource) -> GateSettings:
    """Read and validate a gate; relative paths in it become absolute.

    Raises UserError with every error, one per line.
    """
    if isinstance(source, GateSettings):
        return source
    return load_settings(GateSettings, source, "gate")
