"""The adapter of a fit: π_ref restored after it, the check of its anchor, its folder on disk."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError

from constrained_dpo.fit.shared_prompts import evaluating
from data_prep.errors import UserError
from data_prep.files import sync_folder
from data_prep.models.policy import Policy
from data_prep.sampling.logprobs import response_logps


def save_adapter(
    model: PeftModel,
    gathered: dict[str, torch.Tensor] | None,
    log: str,
    temporary: Path,
    output: Path,
) -> None:
    """Writes adapter and log beside `output`, then moves them there; raises OSError naming `output`
    where that fails.

    gathered: the model's whole tensors by name, where `model` holds only this process's part of
    them.
    """
    try:
        # Even where the head is a target the base's own embeddings are not part of the adapter.
        model.save_pretrained(temporary, state_dict=gathered, save_embedding_layers=False)
        (temporary / "training_log.json").write_text(log)
        (temporary / "README.md").unlink(
            missing_ok=True
        )  # PEFT's model card describes another run than this one
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
def _restored_base(policy: Policy) -> Iterator[None]:
    """TRL patches the base's forward and, for checkpointing, its embeddings; the base leaves the
    fit as it came."""
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


def check_anchor(policy: Policy, model: PeftModel, rows: datasets.Dataset) -> float:
    """Largest |log π_θ − stored ref_logp| in nats on a few rows of an untrained adapter, which must
    be π_ref itself.

    Raises UserError above the dtype's tolerance: the pool was then scored by another base, template
    or quantization.
    """
    some = rows.select(range(min(NUM_ANCHOR_ROWS, len(rows))))
    responses, stored = (
        [row[0] for row in some["responses_ids"]],
        [row[0] for row in some["ref_logps"]],
    )
    with evaluating(model):
        logps, _ = response_logps(
            model,
            list(some["prompt_ids"]),
            responses,
            pad_id=policy.tokenizer.pad_token_id,
            batch_size=NUM_ANCHOR_ROWS,
        )
    error = float(np.abs(logps - np.asarray(stored)).max())
    longest = max(map(len, responses))
    tolerance = 1e-3 if policy.settings.reproducible else 0.05 + 0.01 * longest
    if not error <= tolerance:
        raise UserError(
            "fit: log π_θ of the untrained adapter differs from the stored ref_logp by "
            f"{error:.3g} nats (tolerance {tolerance:.3g}); "
            "the pool belongs to another base, quantization or template: prepare the run again"
        )
    return error
