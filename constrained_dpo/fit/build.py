"""How a fit's trainer is put together: TRL's settings in words, PEFT's adapter, float32 weights,
the layout of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import transformers
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl import DPOConfig
from trl.trainer.utils import add_fused_lm_head

from constrained_dpo.fit.checkpoints import KEPT
from constrained_dpo.fit.family import FAMILY_WEIGHTS, is_family, read_family
from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.holdout import residual
from constrained_dpo.fit.rows import PaddedCollator
from constrained_dpo.fit.shared_prompts import (
    SharedPromptCollator,
    add_shared_forward,
    why_not_shared,
)
from constrained_dpo.fit.trainer import FitPlan, PseudoPreferenceTrainer
from data_prep.errors import UserError
from data_prep.models.attachment import check_lora_only
from data_prep.models.checkpoints import explained_loading
from data_prep.models.policy import Policy
from data_prep.models.temperature import temperature_of


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
    if (temperature := temperature_of(policy.model)) != 1.0:
        # TRL's fused head makes its log-probabilities without the model's forward.
        add_fused_lm_head(trainer.model.get_base_model(), temperature=temperature)
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
    _check_blocks(plan)
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


def _check_blocks(plan: FitPlan) -> None:
    """A family goes on with its blocks."""
    if plan.family is None or plan.previous_adapter is None or not is_family(plan.previous_adapter):
        return
    before, now = list(read_family(plan.previous_adapter).units), list(plan.family.units)
    if before != now:
        raise UserError(
            f"{plan.previous_adapter}: has blocks of {', '.join(before)}, and this fit of "
            f"{', '.join(now)}; go on with the version that began the run, or start it anew"
        )


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
        2e-5 if policy.settings.reproducible else 0.05 / policy.settings.temperature
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
