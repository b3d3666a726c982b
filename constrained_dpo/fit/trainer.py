"""The Lagrangian maximizer: TRL's DPOTrainer on pseudo-preferences, with reference
log-probabilities from the pool.

The losses are in `losses.py`, the rows in `rows.py` and `shared_prompts.py`; one fit is played in
`adapter.py`, with `watch.py`, `holdout.py` and `checkpoints.py` over its life. The KL anchor is
π_ref (the base without adapter) in every round: the stored `ref_logp` enters the loss and no
reference model runs here.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from constrained_dpo.fit.checkpoints import KEPT
from constrained_dpo.fit.family import FAMILY_WEIGHTS, Family, is_family
from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.holdout import residual, squared_residuals
from constrained_dpo.fit.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.fit.rows import LengthBuckets, PaddedCollator, row_lengths
from constrained_dpo.fit.shared_prompts import (
    SHARED_INPUTS,
    SharedPromptCollator,
    adapted_head_logps,
    add_shared_forward,
    why_not_shared,
)
from constrained_dpo.fit.watch import FitProgress, StepWatch, kl_estimate
from constrained_dpo.recipe.fit import FitSettings
from data_prep.errors import UserError
from data_prep.models.attachment import check_lora_only
from data_prep.models.checkpoints import explained_loading
from data_prep.models.policy import Policy
from data_prep.models.settings import LoraSettings


@dataclass(frozen=True)
class FitPlan:
    """How an adapter is fitted, from what, and where it goes.

    output: the folder that appears when the fit is done; previous_adapter: where the adapter
    starts; logs: where the trackers of `settings.report_to` write; checkpoints: the folder for
    those of `settings.save_steps`; holdout_seed: draws the held-out prompts; run_name: what
    trackers call this fit. family: of a conditional fit, whose blocks have the rank of `lora` each.
    segment, segments: the fit takes one of so many equal stretches of its schedule; begin: the
    checkpoint at the end of the one before; keep: where this one's goes, None for the last.
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
    segment: int = 0
    segments: int = 1
    begin: Path | None = None
    keep: Path | None = None


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


def training_config(plan: FitPlan, device: str, resumed: bool = False) -> DPOConfig:
    """Set every default of DPOConfig that changes the mathematics in words.

    resumed: the adapter that the fit started from was measured before the kill.
    """
    settings = plan.settings
    config = DPOConfig(
        output_dir=str(plan.output),
        beta=plan.beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps or 0,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}
        if settings.gradient_checkpointing
        else None,
        max_length=None,  # lengths were checked; nothing is truncated
        # True would zero the adapter's dropout; the base's is off since loading
        disable_dropout=False,
        bf16=False,  # no autocast: train- and eval-mode log-probabilities agree
        precompute_ref_log_probs=False,  # they come from the pool
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,  # `watch` sees every gradient's norm
        eval_strategy="steps" if settings.holdout else "no",
        eval_steps=settings.eval_steps,
        eval_on_start=bool(settings.holdout) and not resumed,
        per_device_eval_batch_size=settings.batch_size,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        save_total_limit=KEPT,
        report_to=settings.report_to or "none",
        run_name=plan.run_name,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=plan.seed % 2**32,
    )
    # A process computes on its one device. With more GPUs in sight the Trainer would wrap the
    # model in DataParallel, which TRL refuses.
    config._n_gpu = min(config.n_gpu, 1)
    return config


@contextmanager
def _plain_head_in_sight(model: transformers.PreTrainedModel) -> Iterator[None]:
    """TRL's constructor refuses an adapter on the head, since its fused head would leave it out;
    ours does not (`adapted_head_logps`)."""
    head = model.get_output_embeddings()
    model.get_output_embeddings = lambda: head
    try:
        yield
    finally:
        del model.get_output_embeddings


def build_trainer(
    policy: Policy,
    dataset: datasets.Dataset,
    plan: FitPlan,
    held_out: datasets.Dataset | None = None,
    resumed: bool = False,
) -> PseudoPreferenceTrainer:
    """Build the trainer on the plain base plus a fresh adapter into which the plan's previous one
    is then loaded.

    held_out: rows that are only measured, where the settings ask for them. resumed: `train` will be
    given a checkpoint. Given a PeftModel instead, TRL would copy its adapter as "ref" and anchor
    the KL to the last round's policy.
    """
    settings, lora = plan.settings, plan.lora
    blocks = 1 if plan.family is None else plan.family.num_blocks
    target = (
        lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    )
    with _plain_head_in_sight(policy.model):
        trainer = PseudoPreferenceTrainer(
            model=policy.model,
            args=training_config(plan, policy.device.type, resumed),
            data_collator=PaddedCollator(policy.tokenizer.pad_token_id),
            train_dataset=dataset,
            eval_dataset=held_out,
            compute_metrics=residual,
            processing_class=policy.tokenizer,
            peft_config=LoraConfig(
                r=blocks * lora.r,
                lora_alpha=cast(int, blocks * lora.alpha),  # PEFT takes any number
                lora_dropout=lora.dropout,
                target_modules=target,
                task_type="CAUSAL_LM",
            ),
        )
    trainer.listwise, trainer.by_length = settings.loss == "listwise", settings.group_by_length
    trainer.loraplus_ratio = settings.loraplus_ratio
    if plan.family is not None:
        trainer.gates = Gates(plan.family.rank)
        trainer.gates.attach(trainer.model)
    for callback in (
        PrinterCallback,
        transformers.ProgressCallback,
    ):  # stdout is for results; progress is ours, on stderr
        trainer.remove_callback(callback)
    trainer.add_callback(FitProgress())
    _float_adapter(trainer, plan.previous_adapter, str(policy.device))
    if list(trainer.model.peft_config) != ["default"] or trainer.ref_model is not None:
        raise RuntimeError(
            f"the trainer holds a reference of its own ({list(trainer.model.peft_config)}); the "
            "KL would not be to π_ref"
        )
    trainer.adapted_head = isinstance(
        trainer.model.get_base_model().get_output_embeddings(), BaseTunerLayer
    )
    trainer.padded_because = (
        _share_prompts(trainer, policy)
        if settings.shared_prompts
        else "fit.shared_prompts is false"
    )
    return trainer


def _float_adapter(trainer: PseudoPreferenceTrainer, previous: Path | None, device: str) -> None:
    """Makes the adapter's weights float32 and loads the previous adapter into them.

    TRL casts the adapter of a quantized base to bf16, where a step of 5e-5 leaves most of lora_A
    unmoved.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if previous is None:
        return
    if not is_family(previous):
        check_lora_only(previous, "warm start")
    with explained_loading("warm start", f"{previous} (of another base, or damaged?)"):
        weights = (
            load_file(previous / FAMILY_WEIGHTS, device=device)
            if is_family(previous)
            else load_peft_weights(str(previous), device=device)
        )
        loaded: Any = set_peft_model_state_dict(trainer.model, weights)
    if loaded.unexpected_keys:
        raise UserError(
            f"{previous}: an adapter of another base or LoRA setting ({loaded.unexpected_keys[0]})"
        )


def _share_prompts(trainer: PseudoPreferenceTrainer, policy: Policy) -> str | None:
    """Turns the shared layout on where it is exact and cheaper; returns the reason where it is
    not."""
    add_shared_forward(trainer.model.get_base_model(), trainer.gates)
    tolerance = (
        2e-5 if policy.settings.reproducible else 0.05
    )  # nats per token; half precision rounds at the third digit of a logit
    parts = [
        rows for rows in (trainer.train_dataset, trainer.eval_dataset) if rows is not None
    ]  # one layout for both
    reason = why_not_shared(
        trainer.model,
        datasets.concatenate_datasets(parts),
        policy.tokenizer.pad_token_id,
        tolerance,
    )
    if reason is None:
        trainer.data_collator = SharedPromptCollator(policy.tokenizer.pad_token_id)
    return reason
