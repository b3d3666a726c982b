"""One ordinary adapter for all categories: a member of a family whose gates differ by prompt.

The gated adapter is the teacher, under each prompt's own gates; the student is a LoRA of the same
shape without gates, and starts from the family at the mean of its prompts' gates. The student is
fitted to the teacher's next-token laws, Σ_t KL(teacher(·|x, y_<t) ‖ student(·|x, y_<t)) over the
whole vocabulary, on responses of the fit (`contexts.py`). The prompt is visible to the policy, so
one adapter can tell the categories apart. Source of the loss: G. Hinton, O. Vinyals and J. Dean,
Distilling the knowledge in a neural network, arXiv:1503.02531.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from constrained_dpo.fit.adapter import restored_base
from constrained_dpo.fit.contexts import SEQUENCES, context_gates, read_contexts
from constrained_dpo.fit.family import Family, read_family, scaled_weights, write_adapter
from constrained_dpo.fit.gates import Gates
from constrained_dpo.progress import Bar
from constrained_dpo.recipe.fit import ConditionalSettings, FitSettings
from data_prep.models.policy import Policy
from data_prep.sampling.logprobs import LOGITS_AT_ONCE

TEACHER, STUDENT = "family", "member"

LOGITS_IN_FORWARD = 2 * LOGITS_AT_ONCE
"""In the model's dtype, at most (or one sequence's): several copies of them exist at a time."""


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

    lambda_: by constraint; settings: a distillation has `conditional.distill_steps` steps with the
    fit's rates and clipping. The same family, λ, κ and seed give the same adapter on the same
    machine, so members nearby differ by what λ does. Where all prompts have the same gates nothing
    is fitted. Raises UserError where the folder holds no such family, FloatingPointError where the
    loss is not finite.
    """
    family, contexts = read_family(folder), read_contexts(folder)
    gates = context_gates(contexts, family, lambda_, kappa)
    by_prompt = gates[~contexts["prompt_id"].duplicated().to_numpy()]
    weights = scaled_weights(folder, by_prompt.mean(axis=0))
    if np.ptp(by_prompt, axis=0).any():
        temporary = output.with_name(f".{output.name}.distill")
        shutil.rmtree(temporary, ignore_errors=True)
        write_adapter(folder, scaled_weights(folder, np.ones(family.num_blocks)), temporary / "t")
        write_adapter(folder, weights, temporary / "s")
        with _both(policy, family, temporary / "t", temporary / "s") as (model, teacher):
            _fit(model, teacher, _Rows(contexts, gates, policy), settings, seed)
            fitted = get_peft_model_state_dict(
                model, adapter_name=STUDENT, save_embedding_layers=False
            )
            weights = {name: value.detach().float().cpu().numpy() for name, value in fitted.items()}
        shutil.rmtree(temporary)
    write_adapter(folder, weights, output)


@contextmanager
def _both(
    policy: Policy, family: Family, teacher: Path, student: Path
) -> Iterator[tuple[PeftModel, Gates]]:
    """The base with the teacher and its gates, and with the student. The base is whole, also where
    a launch shards it in fits."""
    with restored_base(policy, sharded=False):
        model = PeftModel.from_pretrained(policy.model, teacher, adapter_name=TEACHER)
        model.load_adapter(student, STUDENT, is_trainable=True)
        model.eval()
        gates = Gates(family.rank)
        gates.attach(model, TEACHER)
        model.set_adapter(STUDENT)
        yield model, gates


class _Rows:
    """Contexts as batches. gates: (num_rows, blocks)."""

    def __init__(self, contexts: pd.DataFrame, gates: np.ndarray, policy: Policy) -> None:
        self.prompts = [ids.tolist() for ids in contexts["prompt_ids"]]
        self.responses = [ids.tolist() for ids in contexts["response_ids"]]
        self.gates = torch.tensor(gates, dtype=torch.float32)
        self.device, self.pad_id = policy.device, policy.tokenizer.pad_token_id
        self.vocabulary = policy.model.config.get_text_config().vocab_size

    def steps(self, seed: int) -> Iterator[list[list[int]]]:
        """Draw the rows of every step, each in forwards of about equal length."""
        rng, order = np.random.default_rng(seed), np.array([], np.int64)
        while True:
            while len(order) < min(SEQUENCES, len(self.prompts)):
                order = np.append(order, rng.permutation(len(self.prompts)))
            rows, order = order[:SEQUENCES].tolist(), order[SEQUENCES:]
            rows.sort(key=lambda i: (-len(self.responses[i]), -len(self.prompts[i]), i))
            forwards: list[list[int]] = []
            for row in rows:
                longest = len(self.responses[forwards[-1][0]] if forwards else self.responses[row])
                if not forwards or (len(forwards[-1]) + 1) * (longest + 1) > self.most_positions:
                    forwards.append([])
                forwards[-1].append(row)
            yield forwards

    @property
    def most_positions(self) -> int:
        """Of a forward's logits."""
        return LOGITS_IN_FORWARD // self.vocabulary

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, responses on the right: what the model reads, the gates, and
        scored, (num_rows, longest), True where a response token is predicted."""
        prompts, responses = ([ids[i] for i in rows] for ids in (self.prompts, self.responses))
        width, longest = max(map(len, prompts)), max(map(len, responses))
        ids, mask = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            before, after = width - len(prompt), longest - len(response)
            ids.append([self.pad_id] * before + prompt + response + [self.pad_id] * after)
            mask.append([0] * before + [1] * (len(prompt) + len(response)) + [0] * after)
        read = torch.tensor(mask)
        batch = {
            "input_ids": torch.tensor(ids),
            "attention_mask": read,
            "position_ids": (read.cumsum(1) - 1).clamp(min=0),
            "gates": self.gates[rows],
            "scored": read[:, width:].bool(),
        }
        return {name: values.to(self.device) for name, values in batch.items()}


def _fit(model: PeftModel, teacher: Gates, rows: _Rows, settings: FitSettings, seed: int) -> None:
    """Train the student. The model stays in evaluation mode, without dropout; checkpointed layers
    alone are told that they train, for else they make no checkpoints."""
    steps = (settings.conditional or ConditionalSettings()).distill_steps
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=settings.learning_rate,
        loraplus_lr_ratio=settings.loraplus_ratio,
        loraplus_weight_decay=settings.weight_decay,
    )
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.gradient_checkpointing:
        base = cast(PreTrainedModel, model.get_base_model())
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        for layer in base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True
    with Bar("distill", total=steps, unit="step", kind="distill") as bar:
        for step, forwards in zip(range(steps), rows.steps(seed), strict=False):
            optimizer.zero_grad()
            number = sum(map(len, forwards))
            loss = sum(_backward(model, teacher, rows.batch(few), number) for few in forwards)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"distill: the loss of step {step} is {loss}; lower fit.learning_rate"
                )
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            bar.step()
            bar.note(f"KL={loss:.4f}")


def _backward(
    model: PeftModel, teacher: Gates, batch: dict[str, torch.Tensor], number: int
) -> float:
    """Add the gradient of Σ KL(teacher ‖ student)/number over a batch's response tokens; returns
    that value, nats a sequence. In float32 are at most LOGITS_AT_ONCE logits at a time."""
    gates, scored = batch.pop("gates"), batch.pop("scored")
    with torch.no_grad():
        model.set_adapter(TEACHER)
        teacher.set(gates)
        target = _logits(model, batch, scored)
        teacher.set(None)
    model.set_adapter(STUDENT)
    student = _logits(model, batch, scored)
    leaf, total = student.detach().requires_grad_(), 0.0
    size = max(1, LOGITS_AT_ONCE // leaf.shape[1])
    for law, other in zip(leaf.split(size), target.split(size), strict=True):
        logs, goal = law.float().log_softmax(-1), other.float().log_softmax(-1)
        loss = torch.nn.functional.kl_div(logs, goal, reduction="sum", log_target=True) / number
        loss.backward()
        total += loss.item()
    student.backward(leaf.grad)
    return total


def _logits(model: PeftModel, batch: dict[str, torch.Tensor], scored: torch.Tensor) -> torch.Tensor:
    """Of the positions that predict response tokens, (num_tokens, vocabulary)."""
    columns = scored.shape[1] + 1
    logits = model(**batch, use_cache=False, logits_to_keep=columns).logits
    return logits[:, -columns:-1][scored]
