"""A fit in stretches: one schedule, cut into equal stretches, each on labels of its own.

Between two stretches the policy is sampled again (`fit.refresh`), so that a fit does not drift off
the responses it was given. Optimizer, rates and random state go on from the checkpoint at the end
of the stretch before.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from transformers import TrainerCallback

from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.launch import num_processes, shards_base
from data_prep.errors import UserError
from data_prep.files import sync_folder


def in_stretch(
    plan: FitPlan, rows: datasets.Dataset
) -> tuple[FitPlan, datasets.Dataset, int | None]:
    """Give the plan of the whole schedule, this stretch's rows, and the step at which it ends (None
    for the last stretch).

    A stretch takes the same number of steps as the others: steps/stretches, rounded, or its rows
    `epochs` times. Its rows are whole permutations of those given and the beginning of another.
    Raises UserError where the launch shards the base, which writes no checkpoints.
    """
    if shards_base():
        raise UserError(
            "fit.refresh: a fit cannot be cut where the launch shards the base; set it to 1"
        )
    settings = plan.settings
    per_step = settings.batch_size * settings.gradient_accumulation * num_processes()
    steps = (
        max(1, round(settings.steps / plan.stretch.count))
        if settings.steps
        else math.ceil((settings.epochs or 1) * len(rows) / per_step)
    )
    rng = np.random.default_rng([plan.seed % 2**32, plan.stretch.number])
    passes = math.ceil(steps * per_step / len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(passes)])
    whole = settings.model_copy(update={"steps": steps * plan.stretch.count, "epochs": None})
    end = None if plan.stretch.keep is None else steps * (plan.stretch.number + 1)
    return replace(plan, settings=whole), rows.select(order[: steps * per_step]), end


class StretchEnd(TrainerCallback):
    """Stop the fit with a checkpoint at a step; None: it runs to its end."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def unfinished(checkpoint: Path | None, end: int | None) -> Path | None:
    """Give the checkpoint inside a stretch that it goes on from; one at its very end, which a kill
    left before the adapter was saved, is not used."""
    if checkpoint is None or end is None or _step(checkpoint) < end:
        return checkpoint
    return None


def keep_checkpoint(plan: FitPlan, step: int | None) -> None:
    """Move the checkpoint at the end of a stretch, at `step`, to where the next one finds it."""
    if plan.stretch.keep is None or plan.checkpoints is None:
        return
    os.replace(plan.checkpoints / f"checkpoint-{step}", plan.stretch.keep)
    sync_folder(plan.stretch.keep.parent)
