"""The recipe: one YAML file that fully describes a run. Typed and frozen; unknown keys are errors;
all errors are shown at once.

The keys of `policy`, `prompts`, `sampling` and the scorers are defined, documented and read in
`data_prep`; the rest here.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.dual import DualSettings
from constrained_dpo.recipe.fit import FitSettings
from constrained_dpo.recipe.implied import with_implied
from constrained_dpo.recipe.objective import ConstraintSettings, ObjectiveSettings
from constrained_dpo.recipe.pool import PoolSettings
from data_prep.errors import UserError
from data_prep.models.settings import PolicySettings
from data_prep.prompts.settings import PromptSettings
from data_prep.sampling.law import SamplingSettings, is_policy_law
from data_prep.scorers.settings import NOT_IDENTIFIED, ScorerSettings
from data_prep.settings import EMBEDDED, Settings


class Recipe(Settings):
    """A whole run."""

    name: str = Field(description="what the run is called in tables and reports")
    seed: int = Field(
        0, ge=0, description="every draw is a function of (seed, round, phase, shard)"
    )
    policy: PolicySettings = Field(description="base model and adapter")
    prompts: PromptSettings = Field(description="where prompts come from")
    sampling: SamplingSettings = Field(
        default_factory=SamplingSettings, description="how responses are drawn"
    )
    objective: ObjectiveSettings = Field(description="β, reward and constraints")
    pool: PoolSettings = Field(
        default_factory=PoolSettings, description="the pool of scored responses"
    )
    dual: DualSettings = Field(default_factory=DualSettings, description="the multipliers")
    fit: FitSettings = Field(default_factory=FitSettings, description="the DPO fit")

    _tail_points: dict[str, float] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _with_implied(cls, content: Any) -> Any:
        return with_implied(content)

    @property
    def stretches(self) -> int:
        """In how many stretches a fit comes: one where the pool does not grow, and by default where
        a stretch's samples would give no group."""
        measured = self.dual.responses_per_prompt
        few = 0 < measured < self.fit.stretches * self.fit.group_size
        if not self.pool.grow or (few and self.fit.refresh is None):
            return 1
        return self.fit.stretches

    @property
    def trained_range(self) -> float:
        """By what factor around λ a family is trained.

        Narrower where rows say little of each multiplier: with many of them, and with a tail, which
        weighs a few answers 1/α times as much.
        """
        if self.fit.conditional is None:
            raise ValueError("fit.conditional is null: the recipe fits no family")
        if self.fit.conditional.range is not None:
            return self.fit.conditional.range
        if self.problem.has_tails:
            return 1.5
        return 2.0 if len({c.block for c in self.problem.constraints}) > 2 else 3.0

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        problems = self._problem_mistakes()
        if self.sampling.max_new_tokens >= self.fit.max_length:
            problems.append(
                "sampling.max_new_tokens leaves no room for a prompt within fit.max_length"
            )
        problems += self.pool.too_few(
            self.fit.group_size,
            self.sampling.responses_per_prompt,
            self.dual.responses_per_prompt,
            self.dual.rounds,
        )
        problems += self.dual.too_few()
        problems += self._label_mistakes() + self._scorer_mistakes() + self._family_mistakes()
        if self.policy.model == EMBEDDED and self.sampling.max_new_tokens != 3:
            problems.append(
                "the embedded world's answers have at most 3 tokens: sampling.max_new_tokens must "
                "be 3"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problem_mistakes(self) -> list[str]:
        try:
            problem = self.problem
        except UserError as error:
            return [f"objective: {error}"]
        mistakes = []
        for key, values in (("init", self.dual.init), ("step_scale", self.dual.step_scale)):
            try:
                if isinstance(values, dict) and not self.uncategorized:
                    problem.multipliers(values)
            except UserError as error:
                mistakes.append(f"dual.{key}: {error}")
        return mistakes

    def _label_mistakes(self) -> list[str]:
        mistakes = []
        if self.fit.labels == "given" and self.pool.source == "reference":
            mistakes.append(
                "fit.labels: given are labels of a dataset's responses; set pool.source: dataset "
                "(or both)"
            )
        chosen = self.pool.shares is not None or self.pool.max_per_prompt is not None
        if self.fit.labels == "given" and chosen:
            mistakes.append(
                "fit.labels: given takes every labelled pair; drop pool.shares and "
                "pool.max_per_prompt"
            )
        return mistakes

    def _family_mistakes(self) -> list[str]:
        mistakes, conditional = [], self.fit.conditional
        constrained = bool(self.objective.constraints)
        if constrained and (self.dual.method == "solve") != (conditional is not None):
            mistakes.append(
                "dual.method: solve and fit.conditional need each other: λ is solved for on a "
                "policy that was fitted for every λ; give both, or another method and null"
            )
        if self.objective.kl_budget is not None and (
            conditional is None or conditional.kappa is None
        ):
            mistakes.append(
                "objective.kl_budget: the KL is set by κ; give fit.conditional.kappa a range, such "
                "as [0.5, 1.5]"
            )
        if self.objective.kl_budget is not None and not is_policy_law(self.sampling):
            mistakes.append(
                "objective.kl_budget: no KL is known at sampling.temperature ≠ 1 or top_p < 1; "
                "policy.temperature makes another temperature the policy's own"
            )
        if (self.fit.refresh or 1) > 1 and not self.pool.grow:
            mistakes.append(
                "fit.refresh: what is sampled within a fit joins the pool; set pool.grow to true, "
                "or fit.refresh to 1"
            )
        measured, refresh = self.dual.responses_per_prompt, self.fit.refresh or 1
        if refresh > 1 and 0 < measured < refresh * self.fit.group_size:
            mistakes.append(
                f"fit.refresh: {measured // refresh} responses of a prompt after a stretch give no "
                f"group of {self.fit.group_size}; raise dual.responses_per_prompt, or lower "
                "fit.refresh or fit.group_size"
            )
        return mistakes

    def _scorer_mistakes(self) -> list[str]:
        mistakes = [
            f"scorer of {name}: a column scorer cannot score fresh samples; use it with `cdpo data "
            "score`"
            for name, scorer in self.scorers.items()
            if scorer.type == "column"
        ]
        for constraint in self.objective.constraints:
            if constraint.scorer.type != "implicit":
                continue
            key = f"objective.constraints.{constraint.name}"
            if constraint.threshold is not None:
                mistakes.append(f"{key}.threshold: {NOT_IDENTIFIED}")
            if constraint.kind != "mean":  # of levels, over the answers to all prompts
                mistakes.append(f"{key}.kind: {NOT_IDENTIFIED} of a mean")
            if constraint.margins_in_std:  # the std between prompts is log Z's
                mistakes.append(f"{key}.margin: {NOT_IDENTIFIED} as a number in std")
        return mistakes

    @property
    def problem(self) -> ConstrainedProblem:
        """The constrained problem; a margin in std is a number once `prepare` has measured its
        unit, and a tail has a point once `prepare` has set it (`at_tail_points`)."""
        problem = ConstrainedProblem(
            self.objective.reward.name,
            self.objective.beta,
            tuple(c for settings in self.objective.constraints for c in settings.constraints),
        )
        return problem.with_tail_points(self._tail_points)

    def at_tail_points(self, points: Mapping[str, float]) -> "Recipe":
        """Give the recipe with its tails at these points, by constraint (score units): the run's
        state, which every round moves, and no key of the recipe."""
        recipe = self.model_copy()
        recipe._tail_points = dict(points)
        return recipe

    @property
    def scorers(self) -> dict[str, ScorerSettings]:
        """Scorer settings by objective name, the reward first."""
        reward = self.objective.reward
        utilities = {c.name: c.scorer for c in self.objective.constraints}
        return {reward.name: reward.scorer} | utilities

    @property
    def score_ranges(self) -> dict[str, tuple[float, float]]:
        """Ranges of the scores by objective, and of those that constraints are on by the
        constraint's name, infinite where nothing bounds them."""
        ranges = {name: scorer.score_range for name, scorer in self.scorers.items()}
        return ranges | {c.name: ranges[c.scored] for c in self.problem.constraints}

    @property
    def category_columns(self) -> list[str]:
        """The columns of the prompts' sources that hold categories."""
        columns = (c.by for c in self.objective.constraints if c.by is not None)
        return list(dict.fromkeys(columns))

    @property
    def uncategorized(self) -> bool:
        """Whether the categories of a constraint are not known yet."""
        return any(c.by is not None and c.categories is None for c in self.objective.constraints)

    def with_categories(self, categories: Mapping[str, dict[str, list[str]] | None]) -> "Recipe":
        """Give the recipe with the categories of the named constraints. Raises UserError where a
        margin's category, or a name in `dual`, is not among them."""
        constraints = []
        for c in self.objective.constraints:
            given = (
                c.model_dump() | {"categories": categories[c.name]} if c.name in categories else {}
            )
            try:
                constraints.append(ConstraintSettings.model_validate(given) if given else c)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise UserError(f"objective.constraints.{c.name}: {reason}") from None
        objective = self.objective.model_copy(update={"constraints": constraints})
        recipe = self.model_copy(update={"objective": objective})
        if mistakes := recipe._problem_mistakes():
            raise UserError(mistakes[0])
        return recipe

    def with_reference_stds(self, stds: Mapping[str, float | None]) -> "Recipe":
        """Give the recipe with `reference_std` of the named constraints."""
        constraints = [
            c.model_copy(update={"reference_std": stds[c.name]}) if c.name in stds else c
            for c in self.objective.constraints
        ]
        return self.model_copy(
            update={"objective": self.objective.model_copy(update={"constraints": constraints})}
        )

    def as_given(self) -> "Recipe":
        """Give the recipe without what `prepare` measured of the constraints."""
        measured = dict.fromkeys(c.name for c in self.objective.constraints)
        return self.with_reference_stds(measured).with_categories(measured)

    def hash(self) -> str:
        """Identity of the recipe: what differs from the defaults, so that a later release's new
        keys leave it as it is; without what `prepare` writes: dual.step_scale, which it resolves
        from `auto` into numbers, reference_std and categories."""
        content = self.as_given().model_dump(mode="json", exclude_defaults=True)
        dual = {key: value for key, value in content.pop("dual", {}).items() if key != "step_scale"}
        return hashlib.sha256(json.dumps([content, dual], sort_keys=True).encode()).hexdigest()[:16]
