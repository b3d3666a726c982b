"""The keys of the recipe's `dual` block: the multipliers and how they move."""

from typing import Literal

from pydantic import Field

from data_prep.settings import Settings


class DualSettings(Settings):
    """The multipliers and how they move."""

    method: Literal["solve", "subgradient", "one_shot", "fixed"] = Field(
        "solve",
        description="solve: the root of u, by trials of a conditional policy; subgradient: a step; "
        "one_shot: λ from reference samples, kept; fixed: λ = init, kept",
    )
    step_size: float = Field(0.5, gt=0, description="η, in units of step_scale")
    step_schedule: Literal["constant", "inverse_sqrt"] = Field(
        "constant", description="η, or η/√(round+1)"
    )
    step_scale: Literal["raw", "auto"] | dict[str, float] = Field(
        "auto",
        description="auto: std(r)/var(g) of the reference samples (resolved into numbers by "
        "`prepare`); raw: 1",
    )
    init: Literal["zeros", "one_shot"] | dict[str, float] = Field(
        "one_shot",
        description="λ_0; one_shot: solved on π_ref's samples, with the room that trials aim at",
    )
    max_lambda: float = Field(50.0, gt=0, description="upper bound of every multiplier")
    rounds: int = Field(4, ge=1, description="how many rounds `cdpo run` plays")
    prompts_per_round: int = Field(
        600, ge=2, description="dual prompts: a fixed subset of the fit prompts"
    )
    responses_per_prompt: int = Field(
        0,
        ge=0,
        description="samples of π_θ per dual or test prompt, each round; 0: about 12,000 on the "
        "dual prompts, 8 to 256",
    )
    reference_responses: int = Field(
        0,
        ge=0,
        description="samples of π_ref per dual or test prompt, once: they are the level of every "
        "round and of every trial; 0: twice responses_per_prompt with solve, else as many",
    )
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="level of the intervals of u and of the verdict"
    )
    confidence_side: Literal["none", "lower"] | None = Field(
        None,
        description="lower: λ moves by the lower confidence bound of u (solve: with room for the "
        "test prompts' verdict), so that the constraint holds with probability `confidence`; none: "
        "by u; null: lower with solve, else none",
    )
    trials: int = Field(
        8,
        ge=1,
        description="solve: at most so many multipliers are tried in a round, each with a quarter "
        "of responses_per_prompt",
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="`cdpo run --until-converged`: slack in shares of the rise asked for, and "
        "change of λ in shares of λ",
    )

    def too_few(self) -> list[str]:
        """Say where π_ref answers each prompt once: one answer has nothing to be judged against, so
        nothing bounds u."""
        drawn = self.reference_responses
        if not drawn and self.method != "solve":
            drawn = self.responses_per_prompt
        if drawn != 1:
            return []
        key = "reference_responses" if self.reference_responses else "responses_per_prompt"
        return [f"dual.{key}: 1 answer of π_ref to a prompt bounds no u; give at least 2"]

    @property
    def with_room(self) -> bool:
        """Whether λ aims at a bound of u in place of u."""
        side = self.confidence_side or ("lower" if self.method == "solve" else "none")
        return side == "lower"

    target_gap: float | None = Field(
        None,
        gt=0,
        description="`cdpo run --until-converged`: also the objective within this of the bound on "
        "the optimum (reward units)",
    )
