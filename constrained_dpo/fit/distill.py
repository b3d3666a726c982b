"""One ordinary adapter for all categories: a member of a family whose gates differ by prompt.

The gated adapter is the teacher, under each prompt's own gates; the student is a LoRA of the same
shape without gates, and starts from the family at the mean of its prompts' gates. The student is
fitted to the teacher's next-token laws, Σ_t KL(teacher(·|x, y_<t) ‖ student(·|x, y_<t)) over the
whole vocabulary, on responses of the fit (`contexts.py`). The prompt is visible to the policy, so
one adapter can tell the categories apart. Source of the loss: G. Hinton, O. Vinyals and J. Dean,
Distilling the knowledge in a neural network, arXiv:1503.02531.
"""

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader
from transformers import get_scheduler

from constrained_dpo.fit.adapter import restored_base
from constrained_dpo.fit.contexts import context_gates, read_contexts
from constrained_dpo.fit.family import Family, read_family, scaled_weights, write_adapter
from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.rows import UNSCORED, PaddedCollator
from constrained_dpo.progress import Bar
from constrained_dpo.recipe.fit import ConditionalSettings, FitSettings
from data_prep.models.policy import Policy
from data_prep.sampling.logprobs import LOGITS_AT_ONCE

TEACHER, STUDENT = "family", "member"


def distill_member(
    policy: Policy,
    folder: Path,
    lambda_: pd.Series,
    kappa: float,
    settings: FitSettings,
    seed: int,
    output: Path,
) -> None:
    """Write the family's member at λ and κ as an ordinary LoRA folder that appears whole.

    lambda_: by constraint; settings: a distillation has `conditional.distill_steps` steps of the
    fit's size, rate and clipping. The same family, λ, κ and seed give the same adapter on the same
    machine, so members nearby differ by what λ does. Where all prompts have the same gates nothing
    is fitted. Raises UserError where the folder holds no such family, FloatingPointError where the
    loss is not finite.
    """
    family, contexts = read_family(folder), read_contexts(folder)
    gates = context_gates(contexts, family, lambda_, kappa)
    by_prompt = gates[~contexts["prompt_id"].duplicated().to_numpy()]
    weights = scaled_weights(folder, by_prompt.mean(axis=0))
    if np.ptp(by_prompt, axis=0).any():
        rows = [
            {
                "prompt_ids": prompt.tolist(),
                "responses_ids": [response.tolist()],
                "gates": row.tolist(),
            }
            for prompt, response, row in zip(
                contexts["prompt_ids"],
                contexts["response_ids"],
                gates.astype(np.float32),
                strict=True,
            )
        ]
        with _both(policy, folder, family, weights) as (model, teacher):
            _fit(model, teacher, rows, policy, settings, seed)
            fitted = get_peft_model_state_dict(
                model, adapter_name=STUDENT, save_embedding_layers=False
            )
            weights = {name: value.detach().float().cpu().numpy() for name, value in fitted.items()}
    write_adapter(folder, weights, output)


@contextmanager
def _both(
    policy: Policy, folder: Path, family: Family, start: dict[str, np.ndarray]
) -> Iterator[tuple[PeftModel, Gates]]:
    """The base with the teacher and its gates, and with the student, whose weights start there."""
    with tempfile.TemporaryDirectory() as temporary, restored_base(policy):
        teacher, student = (Path(temporary) / name for name in (TEACHER, STUDENT))
        write_adapter(folder, scaled_weights(folder, np.ones(family.num_blocks)), teacher)
        write_adapter(folder, start, student)
        model = PeftModel.from_pretrained(policy.model, teacher, adapter_name=TEACHER)
        model.load_adapter(student, STUDENT, is_trainable=True)
        model.eval()
        gates = Gates(family.rank)
        gates.attach(model, TEACHER)
        model.set_adapter(STUDENT)
        yield model, gates


def _fit(
    model: PeftModel,
    teacher: Gates,
    rows: list[dict],
    policy: Policy,
    settings: FitSettings,
    seed: int,
) -> None:
    """Train the student on rows of prompt_ids, responses_ids (one) and gates."""
    steps = (settings.conditional or ConditionalSettings()).distill_steps
    in_step, at_once = _sizes(rows, policy, settings)
    loader: DataLoader = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=at_once,
        shuffle=True,
        drop_last=len(rows) >= at_once,
        collate_fn=PaddedCollator(policy.tokenizer.pad_token_id),
        generator=torch.Generator().manual_seed(seed % 2**63),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=settings.learning_rate,
        loraplus_lr_ratio=settings.loraplus_ratio,
        loraplus_weight_decay=settings.weight_decay,
    )
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)
    if settings.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.enable_input_require_grads()
    with Bar("distill", total=steps, unit="step", kind="distill") as bar:
        for step in range(steps):
            optimizer.zero_grad()
            total = 0.0
            for batch in itertools.islice(batches, -(-in_step // at_once)):
                loss = _divergence(model, teacher, batch, settings.gradient_checkpointing) / in_step
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"distill: the loss of step {step} is {total}; lower fit.learning_rate"
                )
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            bar.step()
            bar.note(f"KL={total:.4f}")


def _sizes(rows: list[dict], policy: Policy, settings: FitSettings) -> tuple[int, int]:
    """Sequences of a step, as many as a fit's, and of a forward, whose logits fit into memory."""
    in_forward = settings.batch_size * (settings.group_size if settings.grouped else 2)
    longest = max(len(row["prompt_ids"]) + len(row["responses_ids"][0]) for row in rows)
    most = LOGITS_AT_ONCE // (longest * policy.model.config.get_text_config().vocab_size)
    return in_forward * settings.gradient_accumulation, max(1, min(in_forward, most, len(rows)))


def _divergence(
    model: PeftModel, teacher: Gates, batch: dict[str, torch.Tensor], checkpointing: bool
) -> torch.Tensor:
    """Σ KL(teacher ‖ student) over the responses' tokens of a batch, nats."""
    device = model.get_input_embeddings().weight.device
    batch = {name: values.to(device) for name, values in batch.items()}
    scored = batch["labels"][:, 1:] != UNSCORED

    def laws() -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return torch.log_softmax(logits[scored].float(), dim=-1)

    with torch.no_grad():
        model.set_adapter(TEACHER)
        teacher.set(batch["gates"])
        target = laws()
        teacher.set(None)
    model.set_adapter(STUDENT)
    model.train(checkpointing)  # checkpoints are made in training mode alone
    student = laws()
    model.eval()
    return torch.nn.functional.kl_div(student, target, reduction="sum", log_target=True)
