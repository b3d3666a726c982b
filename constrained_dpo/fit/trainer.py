"""The Lagrangian maximizer: TRL's DPOTrainer on pseudo-preferences, with reference
log-probabilities from the pool.

The losses are in `losses.py`, the rows in `rows.py` and `shared_prompts.py`; one fit is played in
`adapter.py`, with `watch.py`, `holdout.py` and `checkpoints.py` over its life. The KL anchor is
π_ref (the base without adapter) in every round: the stored `ref_logp` enters the loss and no
reference model runs here.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from trl import DPOTrainer

from constrained_dpo.fit.family import Family
from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.holdout import squared_residuals
from constrained_dpo.fit.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.fit.rows import LengthBuckets, row_lengths
from constrained_dpo.fit.shared_prompts import SHARED_INPUTS, adapted_head_logps
from constrained_dpo.fit.stretch import Stretch
from constrained_dpo.fit.watch import StepWatch, kl_estimate
from constrained_dpo.recipe.fit import FitSettings
from data_prep.models.settings import LoraSettings


@dataclass(frozen=True)
class FitPlan:
    """How an adapter is fitted, from what, and where it goes.

    output: the folder that appears when the fit is done; previous_adapter: where the adapter
    starts; logs: where the trackers of `settings.report_to` write; checkpoints: the folder for
    those of `settings.save_steps`; holdout_seed: draws the held-out prompts; run_name: what
    trackers call this fit. family: of a conditional fit, whose blocks have the rank of `lora` each.
    stretch: the part of the schedule that it plays.
    """

    settings: FitSettings
    lora: LoraSettings
    beta: float
    seed: int
    output: Path
    previous_adapter: Path | None = None
    logs: Path | None = None
    checkpoints: Path | None = None
    holdout_seed: int = 0
    run_name: str | None = None
    family: Family | None = None
    stretch: Stretch = field(default_factory=Stretch)


class PseudoPreferenceTrainer(DPOTrainer):
    """DPOTrainer on rows that are token ids already: pairs with a target each, or groups with
    scores; reference log-probabilities are cached in both."""

    listwise = False
    by_length = False
    watch: StepWatch | None = None
    padded_because: str | None = None  # why a row's prompt is not shared; None where it is
    adapted_head = False
    gates: Gates | None = None
    loraplus_ratio = 1.0

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.loraplus_ratio != 1:
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model,
                optimizer,
                loraplus_lr_ratio=self.loraplus_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **settings,
            )
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset=None):
        if not self.by_length:
            return super()._get_train_sampler(train_dataset)
        rows_per_step = (
            self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        prompts, responses = row_lengths(self.train_dataset)
        in_one = responses.sum(axis=1) if self.padded_because is None else responses.max(axis=1)
        return LengthBuckets(prompts + in_one, rows_per_step, self.args.seed)

    def _log_probabilities(self, model, inputs) -> torch.Tensor:
        """log π_θ of every response, (num_rows, K), nats, in the layout that the collator chose."""
        count = inputs["ref_logps"].shape[1]
        shared = "segments" in inputs
        if self.gates is not None:  # until the backward pass is done: checkpoints compute again
            self.gates.set(inputs["gates"], 1 if shared else count)
        if shared:
            return model(**{name: inputs[name] for name in SHARED_INPUTS}, num_responses=count)
        sequences = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        if self.adapted_head:
            return adapted_head_logps(model, **sequences).view(-1, count)
        return (
            model(**sequences, use_cache=False, fused_lm_head=True)
            .log_probs.float()
            .sum(dim=1)
            .view(-1, count)
        )

    def _betas(self, inputs: dict[str, torch.Tensor]) -> float | torch.Tensor:
        """β, or β/κ of each row of a family: (num_rows, 1)."""
        return self.beta / inputs["kappa"][:, None] if "kappa" in inputs else self.beta

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        policy = self._log_probabilities(model, inputs)
        log_ratio = policy - inputs["ref_logps"]
        loss, reported = (
            self._pair_loss(log_ratio, inputs)
            if "target" in inputs
            else self._group_loss(log_ratio, inputs)
        )
        if self.watch is not None:
            self.watch.saw(inputs, policy, loss, self.state.global_step + self.model.training)
        if "sample_logps" in inputs:
            reported |= kl_estimate(policy, inputs["ref_logps"], inputs["sample_logps"])
        mode = "train" if self.model.training else "eval"
        for name, value in reported.items():
            mean = self.accelerator.gather(value.detach()).nanmean().item()
            if not math.isnan(
                mean
            ):  # a KL without a law; a loss that is not finite has stopped the fit
                self._metrics[mode][name].append(mean)
        return (loss, log_ratio) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Of held-out rows: the loss, the squared residual of each row, and its number."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, log_ratio = self.compute_loss(model, inputs, return_outputs=True)
        return loss, squared_residuals(log_ratio, inputs, self._betas(inputs)), inputs["row"]

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have errors of their own for a full disk
            raise OSError(
                f"{self.args.output_dir}: the checkpoint cannot be saved ({error})"
            ) from error

    def _pair_loss(
        self, log_ratio: torch.Tensor, inputs: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        betas = self._betas(inputs)
        margin = (betas * (log_ratio[:, :1] - log_ratio[:, 1:])).squeeze(1)
        chosen, rejected = (betas * log_ratio).unbind(dim=1)
        reported = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margin,
        }
        return (inputs["weight"] * pair_loss(margin, inputs["target"])).mean(), reported

    def _group_loss(
        self, log_ratio: torch.Tensor, inputs: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores, loss = inputs["scores"], listwise_loss if self.listwise else all_pairs_loss
        rewards = self._betas(inputs) * log_ratio
        spread = rewards.amax(dim=1) - rewards.amin(dim=1)
        reported = {"rewards/mean": rewards, "rewards/spread": spread}
        return loss(log_ratio, scores, self._betas(inputs)).mean(), reported
