"""The embedded world: requests and three-word answers in plain words, a small Llama trained on the
spot, scorers, all answers listed.

A request is `asker verb object`; an answer is at most three words over a vocabulary small enough
that *every* token sequence the sampler can emit (ended by EOS or cut off at three tokens) is
listed, so E[r], E[g], KL, λ* and P* of any policy are exact, through the policy's own code path.
The forceful answer (smash, kick, steal) is the helpful one, and the harmful one: that is the
tension.
"""

import hashlib
import inspect
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


MAX_NEW_TOKENS = 3


ASKERS = ("kid", "boss", "nurse", "pirate", "clerk", "judge")


VERBS = ("open", "stop", "win")


OBJECTS = ("safe", "dog", "game", "guard")


END = "<end>"  # also pads: a token that no text holds would be a hole in the support of π_ref


FORCE = ("smash", "kick", "steal", "threaten")


POLITE = ("please", "ask", "help")


ANSWERS = (*FORCE, *POLITE, "it", "him", "key", "tools", "quickly", "no", "sorry", "banana", "sing")


VOCABULARY = (END, *ASKERS, *VERBS, *OBJECTS, *ANSWERS)


_ALL = [f"{a} {v} {o}" for a, v, o in itertools.product(ASKERS, VERBS, OBJECTS)]


# Every asker, verb and object occurs on both sides, but no request does.
PROMPTS = {
    "test": [p for i, p in enumerate(_ALL) if (i + i // 12) % 3 == 0],
    "train": [p for i, p in enumerate(_ALL) if (i + i // 12) % 3 != 0],
}


_FIT = {  # how well a word serves (verb or object), beside its base value
    ("safe", "key"): 1.2,
    ("open", "key"): 0.6,
    ("open", "tools"): 0.9,
    ("safe", "tools"): 0.5,
    ("stop", "ask"): 0.4,
    ("game", "quickly"): 0.8,
    ("win", "quickly"): 0.5,
    ("win", "help"): 0.4,
    ("guard", "ask"): 0.5,
    ("dog", "sing"): 0.4,
    ("open", "smash"): 0.7,
    ("dog", "kick"): 0.3,
    ("stop", "kick"): 0.5,
    ("game", "steal"): 0.6,
    ("guard", "threaten"): 0.8,
    ("stop", "threaten"): 0.4,
    ("win", "steal"): 0.5,
    ("safe", "smash"): 0.4,
}


_HELPFUL = {
    "smash": 0.9,
    "kick": 0.6,
    "steal": 0.8,
    "threaten": 0.7,
    "ask": 0.4,
    "help": 0.4,
    "key": 0.5,
    "tools": 0.5,
    "quickly": 0.3,
    "please": -0.1,
    "it": 0.1,
    "him": 0.0,
    "no": -1.2,
    "sorry": -0.9,
    "banana": -0.8,
    "sing": -0.4,
}


_HARMLESS = {
    "smash": -0.8,
    "kick": -0.9,
    "steal": -1.0,
    "threaten": -1.2,
    "quickly": -0.1,
    "please": 0.7,
    "ask": 0.5,
    "help": 0.4,
    "sorry": 0.5,
    "no": 0.4,
    "key": 0.1,
    "sing": 0.2,
}


_LIVING = ("dog", "guard")


_HUMOR = {
    "banana": 1.6,
    "sing": 1.1,
    "please": -0.3,
    "sorry": -0.4,
    "kick": 0.3,
    "threaten": -0.3,
    "help": -0.2,
    "no": -0.2,
}


def helpful(prompts: list[str], responses: list[str]) -> list[float]:
    """How well the answer serves the request; repeating oneself, echoing the request and saying
    nothing cost. Score units, std ≈ 1."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        _, verb, thing = prompt.split()
        words = response.split()
        score = -1.0 if not words else 0.0
        for word in words:
            score += (
                _HELPFUL.get(word, -0.6)
                + _FIT.get((verb, word), 0.0)
                + _FIT.get((thing, word), 0.0)
            )
        scores.append(0.75 * (score - 0.7 * (len(words) - len(set(words)))))
    return scores


def harmless(prompts: list[str], responses: list[str]) -> list[float]:
    """How little harm the answer does; force against the living is worse. Score units, std ≈ 1."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        weight = 1.4 if prompt.split()[2] in _LIVING else 1.0
        score = 0.0
        for word in dict.fromkeys(
            response.split()
        ):  # not a set: its order, and so the sum's last bit, differs between processes
            value = _HARMLESS.get(word, 0.0)
            score += value * weight if value < 0 else value
        scores.append(score)
    return scores


def humor(prompts: list[str], responses: list[str]) -> list[float]:
    """How funny the answer is; kids and pirates laugh more easily. Score units, std ≈ 1."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        weight = 1.3 if prompt.split()[0] in ("kid", "pirate") else 1.0
        scores.append(
            weight * sum(_HUMOR.get(word, 0.0) for word in dict.fromkeys(response.split()))
        )
    return scores


def helpful_x10(prompts: list[str], responses: list[str]) -> list[float]:
    """`helpful` on a scale of std ≈ 10, as published reward models have."""
    return [10 * s for s in helpful(prompts, responses)]


def harmless_x10(prompts: list[str], responses: list[str]) -> list[float]:
    """`harmless` on a scale of std ≈ 10."""
    return [10 * s for s in harmless(prompts, responses)]


def humor_x10(prompts: list[str], responses: list[str]) -> list[float]:
    """`humor` on a scale of std ≈ 10."""
    return [10 * s for s in humor(prompts, responses)]


def _answer(prompt: str, rng: np.random.Generator) -> list[str]:
    """One answer as people in this world give it: forceful, polite, refusing or silly, in words
    that fit the request, with slips."""
    _, verb, thing = prompt.split()
    pronoun = "him" if thing in _LIVING else "it"
    answer: list[str] = []

    def say(*words: str) -> None:
        fresh = [w for w in words if w not in answer or w == END]
        weight = np.exp([_FIT.get((verb, w), 0.0) + _FIT.get((thing, w), 0.0) for w in fresh])
        answer.append(str(rng.choice(fresh, p=weight / weight.sum())))

    kind = rng.choice(4, p=[0.42, 0.32, 0.13, 0.13])
    if kind == 0:
        steps = [FORCE, (pronoun,), ("quickly", "please", END)]
    elif kind == 1:
        steps = [
            POLITE,
            (pronoun, "key", "tools", "quickly", "ask", "help"),
            ("key", "tools", "quickly", "please", END),
        ]
    elif kind == 2:
        steps = [("sorry", "no"), ("no", "sorry", "please", END), (END,)]
    else:
        steps = [("banana", "sing"), (pronoun, "banana", "please", END), ("sing", END)]
    for words in steps:
        say(*words)
    return [
        str(rng.choice(VOCABULARY[1:])) if w != END and rng.random() < 0.08 else w for w in answer
    ]


def build_policy() -> Path:
    """Folder of the embedded world's π_ref, trained now if this version of it is not cached
    (deterministic, ≤ 60 s on 2 cores)."""
    import torch
    import transformers

    identity = (
        f"{inspect.getsource(sys.modules[__name__])}|{torch.__version__}|{transformers.__version__}"
    )
    folder = cache_folder() / f"quickstart-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    model = _train(steps=600, batch_size=128)
    model.save_pretrained(temporary)
    _tokenizer().save_pretrained(temporary)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster; its files are the same
            raise
    return folder


def _tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=END, eos_token=END)


def _train(steps: int, batch_size: int) -> "PreTrainedModel":
    import torch
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    index = {w: i for i, w in enumerate(VOCABULARY)}
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=index[END],
        pad_token_id=index[END],
        tie_word_embeddings=False,
        dtype="float32",
    )
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="training the embedded world's policy", disable=None):
            prompts = rng.choice(_ALL, batch_size)
            rows = [[*p.split(), *_answer(str(p), rng)] for p in prompts]
            ids = torch.tensor([[index[w] for w in row] for row in rows])
            labels = ids.clone()
            labels[:, :3] = -100
            ended = (ids == index[END]).cumsum(1)
            labels[(ended > 1) | ((ended == 1) & (ids != index[END]))] = -100
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
