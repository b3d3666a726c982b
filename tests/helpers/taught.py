"""A tiny policy that was taught what to answer, and LoRA adapters on it that answer otherwise."""

from collections.abc import Mapping
from pathlib import Path

import torch

from tests.helpers.models import save_tiny_causal_lm

END = 2
"""The id of </s>."""

EVERY = range(60)

Lessons = Mapping[range, Mapping[str, float]]
"""By the numbers of a prompt's first word: texts to answer, with their probabilities."""


def taught_base(folder: Path, answers: Mapping[str, float]) -> Path:
    """A tiny Llama that answers prompts of two words by these texts, at these probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny_causal_lm(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _teach(model, AutoTokenizer.from_pretrained(folder), {EVERY: answers}, 200, 3e-3)
    model.save_pretrained(folder)
    return folder


def taught_adapter(base: Path, folder: Path, lessons: Lessons) -> Path:
    """A LoRA adapter on the base with which it answers by these lessons; none: as it did."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if lessons:
        _teach(model, AutoTokenizer.from_pretrained(base), lessons, 150 * len(lessons), 1e-2)
    model.save_pretrained(folder)
    return folder


def _teach(model, tokenizer, lessons: Lessons, steps: int, rate: float) -> None:
    """Cross-entropy of the answers after random prompts of two words, ended by EOS."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    taught = [
        (first, share, tokenizer(text, add_special_tokens=False)["input_ids"] + [END])
        for first, answers in lessons.items()
        for text, share in answers.items()
    ]
    words = tokenizer("w0", add_special_tokens=False)["input_ids"][0]
    model.train()
    for _ in range(steps):
        losses = []
        for first, share, answer in taught:
            prompts = torch.randint(words, words + 60, (16, 2), generator=generator)
            if first != EVERY:
                chosen = torch.randint(len(first), (16,), generator=generator)
                prompts[:, 0] = words + torch.tensor(list(first))[chosen]
            start, end = torch.full((16, 1), 1), torch.tensor([answer]).expand(16, -1)
            ids = torch.cat([start, prompts, end], 1)
            labels = ids.clone()
            labels[:, :3] = -100
            loss = model(input_ids=ids, labels=labels).loss
            losses.append(share * len(answer) * loss)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    model.eval()
