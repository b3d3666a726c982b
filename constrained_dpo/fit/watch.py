"""What is watched while a fit runs: the rows of every step by name, the KL on them, and the first
number that is not finite."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from constrained_dpo.progress import Bar
from data_prep.files import write_json


@torch.no_grad()
def kl_estimate(
    policy: torch.Tensor, reference: torch.Tensor, law: torch.Tensor
) -> dict[str, torch.Tensor]:
    """KL(π_θ ‖ π_ref) in nats from responses that π_θ did not draw: `kl`, and `kl_ess`, how many
    responses it rests on.

    policy, reference, law: log π_θ, log π_ref and the log-probability under the law each response
    was drawn from (π_ref's or an earlier round's, with its temperature; NaN where unknown, as for a
    dataset's responses, which are left out), any shape. The mean of log π_θ/π_ref under
    self-normalised importance weights π_θ/law: consistent in the batch's size, biased in one batch,
    and no estimate where kl_ess is near 1. Both are NaN where no law is known. The round's own `kl`
    is measured on fresh samples instead.
    """
    with_law = ~law.isnan()
    if not with_law.any():
        return {
            "kl": torch.full_like(policy.sum(), torch.nan),
            "kl_ess": torch.full_like(policy.sum(), torch.nan),
        }
    weight = torch.softmax((policy - law)[with_law].double(), dim=0)
    return {
        "kl": (weight * (policy - reference)[with_law]).sum().float(),
        "kl_ess": (1 / (weight**2).sum()).float(),
    }


class StepWatch(TrainerCallback):
    """Stops a fit at the first loss or gradient that is not finite, and leaves the rows of that
    step in `file` (JSON).

    rows: the fit's rows, which `row` of a batch counts in; names are those of the tables.
    """

    def __init__(self, rows: datasets.Dataset, file: Path) -> None:
        self.rows, self.file = rows, file
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen = []

    def saw(
        self, inputs: dict[str, torch.Tensor], policy: torch.Tensor, loss: torch.Tensor, step: int
    ) -> None:
        """Told of every forward: the batch, log π_θ (num_rows, K) and the loss; `step` counts from
        1 (a measurement on held-out rows: the steps before it)."""
        self.seen.append((inputs["row"], policy.detach()))
        if not torch.isfinite(loss):
            self.seen = self.seen[-1:]
            self._stop(f"the loss is {loss.item()}", step)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen = []  # a measurement on held-out rows is no part of a step

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Every step is logged, before it is saved: a checkpoint never holds what such a step
        # did to the weights.
        norm = (logs or {}).get("grad_norm", 0.0)
        if not math.isfinite(norm):
            self._stop(f"the gradient's norm is {norm}", state.global_step)

    def _stop(self, what: str, step: int) -> None:
        rows = [
            self.rows[index] | {"policy_logps": values}
            for batch, policy in self.seen
            for index, values in zip(batch.tolist(), policy.tolist(), strict=True)
        ]
        write_json(
            self.file, {"what": what, "step": step, "rows": [_json_ready(row) for row in rows]}
        )
        raise FloatingPointError(
            f"fit: {what} at step {step}; its batch is in {self.file}: lower fit.learning_rate or "
            "fit.max_grad_norm in another run "
            "(cdpo init --from takes over this one's samples), or look there for a "
            "log-probability or score that is out of range"
        )


def _json_ready(value: object) -> object:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_ready(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class FitProgress(TrainerCallback):
    """A bar with the time that is left and the current loss on stderr.

    end: the step at which a stretch ends, None for a fit's end.
    """

    def __init__(self, end: int | None) -> None:
        self.end = end

    def on_train_begin(self, args, state, control, **kwargs):
        total, done = self.end or state.max_steps, state.global_step
        self.bar = Bar("fit", total=total, unit="step", kind="fit", done=done)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.note(f"loss={float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_log_text(content: dict[str, Any]) -> str:
    """Write training_log.json: `content` as JSON, its `log` with one step per line."""
    head = json.dumps({key: value for key, value in content.items() if key != "log"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in content["log"])
    return f'{head[:-2]},\n "log": [\n  {rows}\n ]\n}}\n'
