"""The keys of the recipe's `fit` block: how one round's Lagrangian maximizer is trained."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_prep.settings import Settings

EVAL_STEPS = 20


Share = Annotated[float, Field(gt=0, le=1)]


class ConditionalSettings(Settings):
    """The family that is fitted in place of one policy: π(y|x; λ) for every λ in a range."""

    range: float | None = Field(
        None,
        gt=1,
        description="rows are labelled under λ/range to λ·range, half of them near "
        "λ itself; null: 3; 2 with more than two utilities, whose draws are noise to each other; "
        "1.5 with a tail, which few answers decide",
    )
    kappa: tuple[float, float] | None = Field(
        None,
        description="[low, high]: rows also vary κ = β/β_row in this range, so that the KL can be "
        "set afterwards; null: β alone",
    )
    distill_steps: int = Field(
        50, ge=1, description="steps that make one adapter of a member whose λ differs by category"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ConditionalSettings":
        if self.kappa is not None and not 0 < self.kappa[0] < 1 < self.kappa[1]:
            raise ValueError(
                f"kappa is {list(self.kappa)}; write [low, high] with 0 < low < 1 < high"
            )
        return self


class FitSettings(Settings):
    """The DPO fit of one round. The defaults are the settings that came nearest to the optimum in
    docs/benchmarks.md; the papers' are in their recipes."""

    labels: Literal["soft", "bernoulli", "argmax", "given"] = Field(
        "soft",
        description="targets of the pairs: P(≻) itself, a draw, the larger; given: the dataset's "
        "own labels whatever λ is (plain DPO on "
        "human preferences; needs pool.source: dataset or both)",
    )
    label_column: str | None = Field(
        None,
        description="for labels given: the column that names the preferred response, "
        "better_response_id or safer_response_id; chosen for "
        "rows of chosen and rejected",
    )
    loss: Literal["auto", "logistic", "listwise"] = Field(
        "auto",
        description="logistic: all pairs of a row; listwise: softmax(log-ratio) over a group "
        "fitted to softmax(score/β), which keeps the scale where pairs saturate; auto: listwise "
        "where more than 3 of 10 pairs of π_ref's responses do",
    )
    group_size: int = Field(
        8,
        ge=2,
        description="responses of a prompt in one row, or as many as sampling.responses_per_prompt "
        "where those are fewer; logistic takes all their pairs (2: pairs)",
    )
    groups_per_prompt: int = Field(
        0,
        ge=0,
        description="groups drawn from a prompt's pool, anew each round (pairs: pairs_per_prompt); "
        "0: as many as the steps read",
    )
    pairs_per_prompt: int | Literal["all"] = Field(
        8, description="pairs drawn from a prompt's pool, anew each round"
    )
    conditional: ConditionalSettings | None = Field(
        ConditionalSettings(),
        description="fit one policy for every multiplier (dual.method: solve); policy.lora.r is "
        "the rank of a block, one for the reward and each utility; null: fit the policy of λ alone",
    )
    refresh: int | None = Field(
        None,
        ge=1,
        description="stretches of a fit; between two of them the policy is sampled again (a "
        "refresh-th of dual.responses_per_prompt) and the labels are drawn anew; null: 4, or 1 "
        "with given labels, an early stop, or too few samples for a group after a stretch",
    )
    loraplus_ratio: float = Field(
        4.0,
        ge=1,
        description="LoRA+ (arXiv:2402.12354): learning rate of the adapter's B over that of A; "
        "16 by default in the embedded world",
    )
    learning_rate: float = Field(
        5e-5,
        gt=0,
        description="peak learning rate of the adapter's A; 5e-4 by default in the embedded world",
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="over one round"
    )
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="linear warm-up at the start of each round (shorter where later_rounds are); "
        "null: a twentieth of the steps, none where epochs are given",
    )
    optimizer: Literal["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit"] = (
        Field("adamw_torch", description="optimizer; its state starts fresh each round")
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of the adapter")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps per round (instead of epochs)"
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the round's rows (instead of steps); neither: 200 steps, more "
        "where a group of each prompt needs them",
    )
    rate_schedule: Literal["constant", "inverse_sqrt"] = Field(
        "constant", description="peak rate of round t: learning_rate, or learning_rate/√(t + 1)"
    )
    later_rounds: Share | list[Share] = Field(
        1.0,
        description="share of steps or epochs that the rounds after the first get; a list: rounds "
        "1, 2, ..., its last for all that follow",
    )
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the prompts, the same in every round, that a fit only measures its "
        "residual on",
    )
    eval_steps: int = Field(
        EVAL_STEPS,
        ge=1,
        description="optimizer steps between two measurements on the held-out prompts",
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        description="stop a fit when the held-out residual has not fallen for so many "
        "measurements in a row, and keep the adapter that "
        "measured best; null: off, the last adapter is kept",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between two checkpoints that a killed fit goes on from; "
        "null: it starts over",
    )
    batch_size: int = Field(4, ge=1, description="rows (pairs or groups) per forward")
    gradient_accumulation: int = Field(4, ge=1, description="forwards per optimizer step")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, about a third slower"
    )
    warm_start: bool = Field(
        True,
        description="start from the last round's adapter (the KL stays to the reference policy)",
    )
    shared_prompts: bool = Field(
        True,
        description="a row's prompt is computed once for all its responses, where a check at the "
        "start finds that exact and cheaper; "
        "training_log.json says why not",
    )
    group_by_length: bool = Field(
        False,
        description="rows of about equal length share a batch: less padding, a little less mixing",
    )
    max_length: int = Field(
        512,
        ge=2,
        description="longest prompt + response in tokens; nothing is truncated, longer is an error",
    )
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        [],
        description="trackers of the loss curves and of each round's λ, u, reward, KL and "
        "objective, under RUN/logs (wandb offline)",
    )

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "FitSettings":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give one of fit.steps and fit.epochs")
        if self.warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "fit.lr_scheduler constant has no warm-up; take constant_with_warmup, or set "
                "fit.warmup_steps to 0"
            )
        if self.warmup_steps and self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(
                f"fit.warmup_steps: {self.warmup_steps} of {self.steps} steps leaves none at the "
                "full rate; lower it"
            )
        if isinstance(self.pairs_per_prompt, int) and self.pairs_per_prompt < 1:
            raise ValueError("fit.pairs_per_prompt must be at least 1, or all")
        if self.grouped and self.labels != "soft":
            raise ValueError(
                f"fit.labels {self.labels} is about pairs; groups (fit.group_size > 2, fit.loss "
                "listwise) take soft"
            )
        return self

    @model_validator(mode="after")
    def _in_stretches(self) -> "FitSettings":
        if self.stretches > 1 and self.early_stop is not None:
            raise ValueError(
                "fit.early_stop ends a fit of one stretch; set fit.refresh to 1, or early_stop to "
                "null"
            )
        if self.labels == "given" and (self.stretches > 1 or self.conditional is not None):
            raise ValueError(
                "fit.labels: given are the dataset's own whatever λ is; set fit.refresh to 1 and "
                "fit.conditional to null"
            )
        return self

    @model_validator(mode="after")
    def _given_labels(self) -> "FitSettings":
        if (self.labels == "given") != (self.label_column is not None):
            raise ValueError(
                "fit.labels: given and fit.label_column need each other; give both, or neither"
            )
        if self.labels == "given" and self.holdout:
            raise ValueError(
                "fit.holdout measures the distance to π*_λ, which is not what fit.labels: given "
                "fits; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _over_the_rounds(self) -> "FitSettings":
        if self.later_rounds == []:
            raise ValueError(
                "fit.later_rounds is an empty list; give a share, or one per later round"
            )
        if not self.holdout and (self.early_stop is not None or self.eval_steps != EVAL_STEPS):
            key = "fit.eval_steps" if self.early_stop is None else "fit.early_stop"
            raise ValueError(
                f"{key} measures on held-out prompts, and there are none; set fit.holdout, e.g. 0.1"
            )
        return self

    def in_round(self, number: int) -> "FitSettings":
        """The settings of round `number`, from 0: `steps` (at least one) or `epochs`, and
        `warmup_steps`, by `later_rounds`; `learning_rate`, by `rate_schedule`."""
        shares = self.later_rounds if isinstance(self.later_rounds, list) else [self.later_rounds]
        share = 1.0 if number == 0 else shares[min(number, len(shares)) - 1]
        falling = self.rate_schedule == "inverse_sqrt"
        changes: dict[str, object] = {
            "warmup_steps": int(share * (self.warmup_steps or 0)),
            "learning_rate": self.learning_rate / math.sqrt(number + 1 if falling else 1),
        }
        if self.steps is not None:
            changes["steps"] = max(1, round(share * self.steps))
        else:
            changes["epochs"] = share * (self.epochs or 0.0)
        return self.model_copy(update=changes)

    @property
    def stretches(self) -> int:
        """In how many stretches a fit comes, with fresh samples between."""
        if self.refresh is not None:
            return self.refresh
        return 1 if self.labels == "given" or self.early_stop is not None else 4

    @property
    def grouped(self) -> bool:
        """Whether a round's labels are groups (groups.parquet) instead of pairs (pairs.parquet)."""
        return self.group_size > 2 or self.loss == "listwise"
