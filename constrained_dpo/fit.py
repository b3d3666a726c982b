"""The Lagrangian maximizer: TRL's DPOTrainer on pseudo-preferences, with reference log-probabilities from the pool.

The losses are in `losses.py`, the rows in `fit_data.py`. The KL anchor is π_ref (the base without adapter) in every round: the stored
`ref_logp` enters the loss and no reference model runs here.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from constrained_dpo.devices import is_main, shards_base, wait
from constrained_dpo.fit_data import GroupCollator, PairCollator, group_dataset, pair_dataset
from constrained_dpo.fit_settings import FitSettings
from constrained_dpo.losses import all_pairs_loss, listwise_loss, pair_loss
from constrained_dpo.tracking import fit_logs
from data_prep.checkpoints import check_adapter_folder, explained_loading
from data_prep.policy import LoraSettings, Policy
from data_prep.sampling import response_logps
from data_prep.settings import UserError
from data_prep.tables import sync_folder

NUM_ANCHOR_ROWS = 16


class PseudoPreferenceTrainer(DPOTrainer):
    """DPOTrainer on rows that are token ids already: pairs with a target each, or groups with scores; reference log-probabilities are
    cached in both."""

    listwise = False

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        logps = output.log_probs.float().sum(dim=1)
        loss, reported = self._pair_loss(logps, inputs) if "target" in inputs else self._group_loss(logps, inputs)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.state.global_step}; lower fit.learning_rate")
        mode = "train" if self.model.training else "eval"
        for name, value in reported.items():
            self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())
        return (loss, output) if return_outputs else loss

    def _pair_loss(self, logps: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        chosen, rejected = logps.chunk(2)
        chosen, rejected = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
        scaled = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        loss = pair_loss(self.beta * (chosen - rejected), inputs["target"]).mean()
        return loss, {name: self.beta * value for name, value in scaled.items()}

    def _group_loss(self, logps: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_ratio, scores = logps.view_as(inputs["scores"]) - inputs["ref_logps"], inputs["scores"]
        loss = listwise_loss if self.listwise else all_pairs_loss
        spread = self.beta * (log_ratio.amax(dim=1) - log_ratio.amin(dim=1))
        reported = {"rewards/mean": self.beta * log_ratio, "rewards/spread": spread}
        return loss(log_ratio, scores, self.beta).mean(), reported


class FitProgress(TrainerCallback):
    """A bar with ETA and the current loss on stderr."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc="fit", unit="step", disable=None, leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_config(settings: FitSettings, beta: float, seed: int, output: Path, device: str, run_name: str | None = None) -> DPOConfig:
    """Every default of DPOConfig that changes the mathematics is set here in words (DESIGN §9)."""
    config = DPOConfig(
        output_dir=str(output),
        beta=beta,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        max_length=None,  # lengths were checked; nothing is truncated
        disable_dropout=False,  # True would zero the adapter's dropout; the base's is off since loading
        bf16=False,  # no autocast: train- and eval-mode log-probabilities agree
        precompute_ref_log_probs=False,  # they come from the pool
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=10,
        save_strategy="no",
        report_to=settings.report_to or "none",
        run_name=run_name,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=seed % 2**32,
    )
    # A process computes on its one device. With more GPUs in sight the Trainer would wrap the model in DataParallel, which TRL refuses.
    config._n_gpu = min(config.n_gpu, 1)
    return config


@contextmanager
def _restored_base(policy: Policy) -> Iterator[None]:
    """TRL patches the base's forward and, for checkpointing, its embeddings; the base leaves the fit as it came."""
    forward = policy.model.__dict__.get("forward")
    try:
        yield
    finally:
        if forward is None:
            policy.model.__dict__.pop("forward", None)
        else:
            policy.model.forward = forward
        policy.model.gradient_checkpointing_disable()
        if hasattr(policy.model, "_require_grads_hooks"):
            policy.model.disable_input_require_grads()
        policy.model.requires_grad_(False)
        policy.model.eval()


def build_trainer(
    policy: Policy,
    dataset: datasets.Dataset,
    settings: FitSettings,
    lora: LoraSettings,
    *,
    beta: float,
    seed: int,
    output: Path,
    previous_adapter: Path | None,
    run_name: str | None = None,
    show_progress: bool = False,
) -> PseudoPreferenceTrainer:
    """The trainer, built on the plain base plus a fresh adapter into which `previous_adapter` is then loaded.

    Given a PeftModel instead, TRL would copy its adapter as "ref" and anchor the KL to the last round's policy.
    """
    target = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    trainer = PseudoPreferenceTrainer(
        model=policy.model,
        args=training_config(settings, beta, seed, output, policy.device.type, run_name),
        data_collator=(GroupCollator if settings.grouped else PairCollator)(pad_token_id=policy.tokenizer.pad_token_id),
        train_dataset=dataset,
        processing_class=policy.tokenizer,
        peft_config=LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target, task_type="CAUSAL_LM"),
    )
    trainer.listwise = settings.loss == "listwise"
    for callback in (PrinterCallback, transformers.ProgressCallback):  # stdout is for results; progress is ours, on stderr
        trainer.remove_callback(callback)
    if show_progress:
        trainer.add_callback(FitProgress())
    # TRL casts the adapter of a quantized base to bf16, where a step of 5e-5 leaves most of lora_A unmoved.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if previous_adapter is not None:
        check_adapter_folder(previous_adapter, "warm start")
        with explained_loading("warm start", f"{previous_adapter} (of another base, or damaged?)"):
            loaded = set_peft_model_state_dict(trainer.model, load_peft_weights(str(previous_adapter), device=str(policy.device)))
        if loaded.unexpected_keys:
            raise UserError(f"{previous_adapter}: an adapter of another base or LoRA setting ({loaded.unexpected_keys[0]})")
    if list(trainer.model.peft_config) != ["default"] or trainer.ref_model is not None:
        raise RuntimeError(f"the trainer holds a reference of its own ({list(trainer.model.peft_config)}); the KL would not be to π_ref")
    return trainer


def check_anchor(policy: Policy, model: PeftModel, rows: datasets.Dataset) -> float:
    """Largest |log π_θ − stored ref_logp| in nats on a few rows of an untrained adapter, which must be π_ref itself.

    Raises UserError above the dtype's tolerance: the pool was then scored by another base, template or quantization.
    """
    some = rows.select(range(min(NUM_ANCHOR_ROWS, len(rows))))
    if "scores" in some.column_names:
        responses, stored = [row[0] for row in some["responses_ids"]], [row[0] for row in some["ref_logps"]]
    else:
        responses, stored = list(some["chosen_ids"]), some["ref_chosen_logps"]
    was_training = model.training
    model.eval()
    logps, _ = response_logps(
        model,
        list(some["prompt_ids"]),
        responses,
        pad_id=policy.tokenizer.pad_token_id,
        batch_size=NUM_ANCHOR_ROWS,
    )
    model.train(was_training)
    error = float(np.abs(logps - np.asarray(stored)).max())
    longest = max(map(len, responses))
    # Half precision, and int8 whose activation scales depend on the batch, reproduce a log-probability only to rounding.
    exact = policy.settings.dtype == "float32" and policy.settings.quantization != "int8"
    tolerance = 1e-3 if exact else 0.05 + 0.01 * longest
    if not error <= tolerance:
        raise UserError(
            f"fit: log π_θ of the untrained adapter differs from the stored ref_logp by {error:.3g} nats (tolerance {tolerance:.3g}); "
            "the pool belongs to another base, quantization or template: prepare the run again"
        )
    return error


def fit_adapter(
    policy: Policy,
    labels: pd.DataFrame,
    pool: pd.DataFrame,
    prompt_tokens: dict[str, list[int]],
    settings: FitSettings,
    lora: LoraSettings,
    *,
    beta: float,
    seed: int,
    previous_adapter: Path | None,
    output: Path,
    logs: Path | None = None,
    run_name: str | None = None,
    show_progress: bool = False,
) -> float | None:
    """Trains one round's adapter and saves it at `output` in PEFT's format; the folder appears whole or not at all.

    labels: rows of the pairs table, or of the groups table where the settings say groups; pool: the responses they name, with `ref_logp`.
    The optimizer starts fresh. Returns the largest |log π_θ − stored ref_logp| before the first step in nats (None after a warm start);
    the log is beside the adapter. `logs` is where the trackers of `settings.report_to` write, `run_name` what they call this fit.
    In a launch of several processes all of them call this, each trains on its own rows of every step's batch, and the main one saves. Where
    the launch shards the base (`shards_base`) the policy cannot be used afterwards and has to be loaded again.
    """
    dataset = (group_dataset if settings.grouped else pair_dataset)(labels, pool, prompt_tokens, settings.max_length)
    temporary = output.with_name(f".{output.name}.tmp")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
    with _restored_base(policy), fit_logs(logs if is_main() else None, settings.report_to):
        trainer = build_trainer(
            policy,
            dataset,
            settings,
            lora,
            beta=beta,
            seed=seed,
            output=temporary,
            previous_adapter=previous_adapter,
            run_name=run_name,
            show_progress=show_progress,
        )
        try:
            anchor_error = check_anchor(policy, trainer.model, dataset) if previous_adapter is None else None
            trainer.train()
            log = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in trainer.state.log_history]
            gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) if shards_base() else None
            if is_main():
                _save_adapter(trainer.model, gathered, {"anchor_error": anchor_error, "log": log}, temporary, output)
        finally:
            if not shards_base():
                trainer.model.unload()
    wait()
    return anchor_error


def _save_adapter(
    model: PeftModel, gathered: dict[str, torch.Tensor] | None, log: dict[str, object], temporary: Path, output: Path
) -> None:
    """Writes adapter and log beside `output`, then moves them there; raises OSError naming `output` where that fails.

    gathered: the model's whole tensors by name, where `model` holds only this process's part of them.
    """
    try:
        model.save_pretrained(temporary, state_dict=gathered)
        (temporary / "training_log.json").write_text(json.dumps(log, indent=1))
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's model card describes another run than this one
        for path in temporary.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, output)
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:  # a full disk is a SafetensorError while weights are written
        raise OSError(f"{output}: the adapter cannot be saved ({error})") from error
