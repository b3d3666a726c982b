"""One fit: its rows, its trainer, the check of its anchor, its adapter on disk, π_ref restored."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError

from constrained_dpo.environment import require_undecided
from constrained_dpo.fit.build import build_trainer
from constrained_dpo.fit.checkpoints import SealedCheckpoints, fit_identity, start_from
from constrained_dpo.fit.contexts import label_contexts, write_contexts
from constrained_dpo.fit.family import seal_family
from constrained_dpo.fit.holdout import HeldOut, split_held_out
from constrained_dpo.fit.rows import group_dataset, pair_dataset
from constrained_dpo.fit.shared_prompts import evaluating
from constrained_dpo.fit.stretches import StretchEnd, in_stretch, keep_checkpoint, unfinished
from constrained_dpo.fit.trainer import FitPlan, PseudoPreferenceTrainer
from constrained_dpo.fit.watch import FitProgress, StepWatch, training_log_text
from constrained_dpo.launch import is_main, rank, shards_base, wait
from constrained_dpo.tracking import fit_logs
from data_prep.errors import UserError
from data_prep.files import sync_folder
from data_prep.models.attachment import intact_base
from data_prep.models.policy import Policy
from data_prep.models.settings import ROUNDING
from data_prep.sampling.logprobs import response_logps

log = logging.getLogger(__name__)


def fit_adapter(
    policy: Policy,
    labels: pd.DataFrame,
    pool: pd.DataFrame,
    prompt_tokens: dict[str, list[int]],
    plan: FitPlan,
) -> float | None:
    """Train one adapter and save it at the plan's output in PEFT's format; the folder appears whole
    or not at all.

    labels: rows of the pairs table, or of the groups table where the settings say groups; pool: the
    responses they name, with `ref_logp`. The optimizer starts fresh, unless the plan's checkpoints
    hold one of this very fit: then it goes on from there, to the same adapter bit for bit on the
    same machine. Returns the largest |log π_θ − stored ref_logp| before the first step in nats
    (None after a warm start or a resume); the log is beside the adapter. In a launch of several
    processes all of them call this, each trains on its own rows of every step's batch, and the main
    one saves. Where the launch shards the base (`shards_base`) the policy cannot be used afterwards
    and has to be loaded again.

    Raises FloatingPointError at the first loss or gradient that is not finite; its batch is then in
    bad_batch.json beside the output (what the N-th process of a launch saw: in
    bad_batch-process-N.json).
    """
    require_undecided()
    rows = group_dataset if plan.settings.grouped else pair_dataset
    dataset = rows(labels, pool, prompt_tokens, plan.settings.max_length, plan.family)
    if is_main():
        shutil.rmtree(_temporary(plan), ignore_errors=True)
        if plan.stretch.keep is not None:  # a stretch is done when its checkpoint is kept
            shutil.rmtree(plan.output, ignore_errors=True)
    plan, checkpoint, seals = _resumed(policy, dataset, plan)
    share, seed = plan.settings.holdout, plan.holdout_seed
    fitted, held_out = split_held_out(dataset, pool["prompt_id"], share, seed)
    measured = HeldOut(plan.settings.early_stop)
    callbacks = seals if held_out is None else [measured, *seals]
    end = None
    if plan.stretch.count > 1:
        plan, fitted, end = in_stretch(plan, fitted)
        callbacks = [*callbacks, StretchEnd(end)]
        checkpoint = unfinished(checkpoint, end) or plan.stretch.begin
    logs, report_to = plan.logs if is_main() else None, plan.settings.report_to
    with (
        restored_base(policy, shards_base()),
        fit_logs(logs, report_to, resumed=checkpoint is not None),
    ):
        saved = plan.checkpoints if plan.settings.save_steps or end else None
        there = replace(plan, output=saved or _temporary(plan))
        trainer = build_trainer(policy, fitted, there, held_out, checkpoint is not None)
        trainer.watch = StepWatch(dataset, _bad_batch(plan))
        for callback in (trainer.watch, FitProgress(end), *callbacks):
            trainer.add_callback(callback)
        try:
            fresh = plan.previous_adapter is None and checkpoint is None
            anchor_error = check_anchor(policy, trainer.model, dataset) if fresh else None
            if checkpoint is not None:
                if checkpoint != plan.stretch.begin:
                    log.info("fit: goes on from %s", checkpoint.name)
                measured.resume(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            measured.restore_best(trainer.model)
            content: dict[str, Any] = {
                "anchor_error": anchor_error,
                "padded_because": trainer.padded_because,
            }
            if held_out is not None:
                content["held_out"] = measured.record(held_out)
            contexts = None
            if plan.family is not None and plan.family.shared:
                contexts = label_contexts(labels, pool, prompt_tokens, plan.family)
            _save(trainer, content, plan, contexts)
            if is_main():
                keep_checkpoint(plan, end)
        finally:
            if not shards_base():
                trainer.model.unload()
    wait()
    if is_main():
        if plan.checkpoints is not None:
            shutil.rmtree(plan.checkpoints, ignore_errors=True)
        for path in plan.output.parent.glob("bad_batch*.json"):
            path.unlink()
    return anchor_error


def _temporary(plan: FitPlan) -> Path:
    return plan.output.with_name(f".{plan.output.name}.tmp")


def _bad_batch(plan: FitPlan) -> Path:
    """Each process saw rows of its own."""
    name = "bad_batch.json" if is_main() else f"bad_batch-process-{rank()}.json"
    return plan.output.with_name(name)


def _resumed(
    policy: Policy, dataset: datasets.Dataset, plan: FitPlan
) -> tuple[FitPlan, Path | None, list[transformers.TrainerCallback]]:
    """The plan, the checkpoint to go on from, and what seals new ones; without a folder for them
    none are written."""
    if not plan.settings.save_steps or plan.checkpoints is None:
        settings = plan.settings.model_copy(update={"save_steps": None})
        return replace(plan, settings=settings), None, []
    identity = fit_identity(
        dataset,
        policy.fingerprint,
        plan.settings,
        plan.lora,
        beta=plan.beta,
        seeds=(plan.seed, plan.holdout_seed),
        previous_adapter=plan.previous_adapter,
    )
    return plan, start_from(plan.checkpoints, identity), [SealedCheckpoints(identity)]


def _save(
    trainer: PseudoPreferenceTrainer,
    content: dict[str, Any],
    plan: FitPlan,
    contexts: pd.DataFrame | None,
) -> None:
    """The adapter and its training log, by the main process; where the base is sharded all gather
    the weights."""
    steps = [
        {k: v for k, v in row.items() if isinstance(v, int | float)}
        for row in trainer.state.log_history
    ]
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) if shards_base() else None
    if is_main():
        text = training_log_text(content | {"log": steps})
        save_adapter(trainer.model, gathered, text, _temporary(plan), plan, contexts)


def save_adapter(
    model: PeftModel,
    gathered: dict[str, torch.Tensor] | None,
    text: str,
    temporary: Path,
    plan: FitPlan,
    contexts: pd.DataFrame | None = None,
) -> None:
    """Writes adapter, or family, and log beside the plan's output, then moves them there; raises
    OSError naming the output where that fails.

    gathered: the model's whole tensors by name, where `model` holds only this process's part of
    them; contexts: of a family whose members are distilled.
    """
    output = plan.output
    try:
        # Even where the head is a target the base's own embeddings are not part of the adapter.
        model.save_pretrained(str(temporary), state_dict=gathered, save_embedding_layers=False)
        (temporary / "training_log.json").write_text(text)
        (temporary / "README.md").unlink(
            missing_ok=True
        )  # PEFT's model card describes another run than this one
        if plan.family is not None:
            seal_family(temporary, plan.family)
            if contexts is not None:
                write_contexts(temporary, contexts)
        for path in temporary.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, output)
        sync_folder(output.parent)
    except (
        OSError,
        SafetensorError,
    ) as error:  # a full disk is a SafetensorError while weights are written
        raise OSError(f"{output}: the adapter cannot be saved ({error})") from error


NUM_ANCHOR_ROWS = 16


@contextmanager
def restored_base(policy: Policy, sharded: bool) -> Iterator[None]:
    """TRL patches the base's forward and, for checkpointing, its embeddings; the base leaves the
    fit as it came, unless the launch shards it."""
    forward = policy.model.__dict__.get("forward")
    # Sharded modules are others for good; the policy is then loaded again.
    whole = nullcontext() if sharded else intact_base(policy.model)
    try:
        with whole, warnings.catch_warnings():
            # transformers renames gradient checkpointing and warns of its own calls
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if forward is None:
            policy.model.__dict__.pop("forward", None)
        else:
            policy.model.forward = forward
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            policy.model.gradient_checkpointing_disable()
        if hasattr(policy.model, "_require_grads_hooks"):
            policy.model.disable_input_require_grads()
        policy.model.requires_grad_(False)
        policy.model.eval()


def check_anchor(policy: Policy, model: PeftModel, rows: datasets.Dataset) -> float:
    """Largest |log π_θ − stored ref_logp| in nats on a few rows of an untrained adapter, which must
    be π_ref itself.

    Raises UserError above the dtype's tolerance: the pool was then scored by another base, template
    or quantization.
    """
    first = rows.select(range(min(NUM_ANCHOR_ROWS, len(rows))))
    responses, stored = (
        [row[0] for row in first["responses_ids"]],
        [row[0] for row in first["ref_logps"]],
    )
    with evaluating(model):
        logps = response_logps(
            model,
            list(first["prompt_ids"]),
            responses,
            pad_id=policy.tokenizer.pad_token_id,
            batch_size=NUM_ANCHOR_ROWS,
        )
    difference = logps - np.asarray(stored)
    error, words = float(np.abs(difference).max()), "nats"
    measured, tolerance = error, 1e-3
    if not policy.settings.reproducible:  # the logits' rounding, over T
        words = "nats per token (root mean square)"
        measured = float(np.sqrt((difference**2).sum() / sum(map(len, responses))))
        tolerance = ROUNDING["float16" if policy.settings.dtype == "float16" else "bfloat16"]
    tolerance /= policy.settings.temperature
    if not measured <= tolerance:
        raise UserError(
            "fit: log π_θ of the untrained adapter differs from the stored ref_logp by "
            f"{measured:.3g} {words} (tolerance {tolerance:.3g}); "
            "the pool belongs to another base, quantization or template: prepare the run again"
        )
    return error
