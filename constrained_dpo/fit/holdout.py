"""Prompts that a fit measures itself on: the off-policy residual on their rows, the early stop, and
the best adapter.

transformers' EarlyStoppingCallback keeps the best adapter by a checkpoint, optimizer included, at
every measurement; here it is a copy of the trainable weights in memory, which the checkpoints of
`fit.save_steps` hold too.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import EvalPrediction, TrainerCallback

from data_prep.errors import UserError

log = logging.getLogger(__name__)

BEST_FILE = "best_adapter.safetensors"


def split_held_out(
    rows: datasets.Dataset, prompts: Collection[str], share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """(rows to fit, rows of the held-out prompts or None): a share of the prompts by the hash of
    (seed, prompt id), at least one.

    prompts: ids of all that the pool has responses to. A prompt may have rows in one round and none
    in another, with too few responses to compare; what is held out must not depend on that. Raises
    UserError where rows to fit or held-out ones are none.
    """
    if not share:
        return rows, None
    ranked = sorted(
        set(prompts),
        key=lambda prompt: hashlib.sha256(f"{seed}/holdout/{prompt}".encode()).digest(),
    )
    count = max(1, round(share * len(ranked)))
    held_out = np.isin(np.asarray(rows["prompt_id"], dtype=object), ranked[:count])
    if held_out.all():
        raise UserError(
            f"fit.holdout: {share:g} of {len(ranked)} prompts leaves none to fit; lower it, or "
            "give more prompts"
        )
    if not held_out.any():
        raise UserError(
            f"fit.holdout: none of the {count} held-out prompts (of {len(ranked)}) has responses "
            "enough to compare; raise it, or give more "
            "responses per prompt"
        )
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def squared_residuals(
    log_ratio: torch.Tensor, inputs: dict[str, torch.Tensor], beta: float | torch.Tensor
) -> torch.Tensor:
    """Variance within each row of s_λ − β log π_θ/π_ref (squared score units), shape (num_rows,): 0
    at the maximizer, whatever drew the responses; log_ratio (num_rows, K). Of a pair (margin −
    β(ρ_chosen − ρ_rejected))²/2. Unbiased: the squares of a row's K responses are divided by K − 1.
    """
    scores = (
        inputs["scores"]
        if "scores" in inputs
        else torch.stack([inputs["margin"], torch.zeros_like(inputs["margin"])], dim=1)
    )
    return (scores - beta * log_ratio).var(dim=1, correction=1)


def residual(prediction: EvalPrediction) -> dict[str, float]:
    """The off-policy residual over rows, in score units: as `certificate.off_policy_residual`,
    within rows in place of prompts."""
    return {"residual": float(np.sqrt(np.mean(prediction.predictions, dtype=np.float64)))}


class HeldOut(TrainerCallback):
    """Follows the residual of the measurements; with a patience it stops the fit and knows the best
    adapter.

    patience: measurements in a row without a fall; None: the fit is only measured. The first
    measurement is of the adapter that the fit started from, so a fit that only makes it worse
    leaves it as it was.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: dict[str, torch.Tensor] = {}
        self.residual, self.step, self.waited, self.stopped_at = float("inf"), 0, 0, None

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        measured = metrics["eval_residual"]
        if self.patience is None or measured < self.residual:
            self.residual, self.step, self.waited = measured, state.global_step, 0
            if self.patience is not None:
                self.best = {
                    name: value.detach().to("cpu", copy=True) for name, value in _trained(model)
                }
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.stopped_at = state.global_step
            kept = f"the adapter of step {self.step} is kept ({self.residual:.4g})"
            log.info(
                "fit: stops at step %d, the held-out residual (%.4g) no longer falls; %s",
                self.stopped_at,
                measured,
                kept,
            )
            control.should_training_stop = True
            control.should_save = False  # the adapter itself is saved next

    def on_save(self, args, state, control, **kwargs):
        if self.best and state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST_FILE
            try:
                save_file(
                    self.best,
                    file,
                    {"held_out": json.dumps([self.residual, self.step, self.waited])},
                )
            except SafetensorError as error:  # a full disk
                raise OSError(f"{file}: the checkpoint cannot be saved ({error})") from error

    def resume(self, checkpoint: Path) -> None:
        """Takes up what `on_save` left in a checkpoint."""
        if self.patience is None:
            return
        with safe_open(checkpoint / BEST_FILE, "pt") as file:
            self.best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.residual, self.step, self.waited = json.loads(file.metadata()["held_out"])

    @torch.no_grad()
    def restore_best(self, model: torch.nn.Module) -> None:
        """Puts the best adapter into the model; nothing without a patience."""
        for name, value in _trained(model):
            if name in self.best:
                value.copy_(self.best[name])

    def record(self, held_out: datasets.Dataset) -> dict[str, object]:
        """For training_log.json: how much was held out, the step whose adapter is kept, its
        residual, and where the fit stopped early."""
        sizes = {"prompts": len(set(held_out["prompt_id"])), "rows": len(held_out)}
        return sizes | {
            "kept_step": self.step,
            "residual": self.residual,
            "stopped_at": self.stopped_at,
        }


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]
