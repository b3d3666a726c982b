"""Worlds that no setting was chosen on: seven syllables, answers of four, prompts whose preferences
share nothing, and a small policy of their own. All 2,801 answers can be listed.

Scores are sums over an answer's syllables, and over its pairs of neighbours, of random weights that
are drawn anew for every prompt; the utility pulls against the reward. Std about 1 where all answers
are alike. In `pairs` most of a score comes from neighbours, 49 weights a prompt, and the policy was
trained briefly: it hardly tells its prompts apart. In `syllables` most comes from the seven
syllables, and the policy knows its prompts.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SYLLABLES = ("ba", "de", "fi", "go", "ku", "lo", "mu")
END = "<end>"
VOCABULARY = (END, *SYLLABLES)
LENGTH = 4
FIT, TEST = 64, 24
PULL = 0.5  # how much of the reward the utility takes back
Scorer = Callable[[list[str], list[str]], list[float]]


@dataclass(frozen=True)
class World:
    """A world's law. alone, beside: std of a syllable's and of a pair's weights; chain: a prompt's
    habits depend on the syllable before; width, steps: of the policy and of its training."""

    alone: float
    beside: float
    chain: bool
    width: int
    steps: int


WORLDS = {
    "pairs": World(alone=0.4, beside=0.35, chain=True, width=64, steps=800),
    "syllables": World(alone=0.55, beside=0.1, chain=False, width=128, steps=1500),
}


def prompts() -> tuple[list[str], list[str]]:
    """Draw the fit and the test prompts: three syllables each, all different."""
    every = [" ".join(words) for words in itertools.permutations(SYLLABLES, 3)]
    order = np.random.default_rng(20).permutation(len(every))
    chosen = [every[k] for k in order[: FIT + TEST]]
    return chosen[:FIT], chosen[FIT:]


def _rng(prompt: str, what: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{what}|{prompt}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


@functools.cache
def _weights(prompt: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the syllables, (7,), and of neighbours, (7, 7), of std 1."""
    rng, count = _rng(prompt, what), len(SYLLABLES)
    return rng.normal(size=count), rng.normal(size=(count, count))


def _score(world: World, prompt: str, response: str, what: str) -> float:
    alone, beside = _weights(prompt, what)
    ids = [SYLLABLES.index(word) for word in response.split()]
    pairs = sum(float(beside[a, b]) for a, b in itertools.pairwise(ids))
    return world.alone * float(alone[ids].sum()) + world.beside * pairs


def _scorers(world: World) -> tuple[Scorer, Scorer]:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [_score(world, p, r, "reward") for p, r in zip(prompts, responses, strict=True)]

    def utility(prompts: list[str], responses: list[str]) -> list[float]:
        other = [_score(world, p, r, "utility") for p, r in zip(prompts, responses, strict=True)]
        taken = reward(prompts, responses)
        return [0.85 * o - PULL * r for o, r in zip(other, taken, strict=True)]

    return reward, utility


reward_pairs, utility_pairs = _scorers(WORLDS["pairs"])
reward_syllables, utility_syllables = _scorers(WORLDS["syllables"])


def _answer(world: World, prompt: str, rng: np.random.Generator) -> list[int]:
    """One answer as this world gives it: a chain of syllables with the prompt's own habits."""
    habits = _rng(prompt, "habits").normal(size=(1 + len(SYLLABLES), len(VOCABULARY)))
    ids: list[int] = []
    while len(ids) < LENGTH and (not ids or ids[-1]):
        weight = np.exp(0.8 * habits[ids[-1] if ids and world.chain else 0])
        weight[0] *= 0.3
        ids.append(int(rng.choice(len(VOCABULARY), p=weight / weight.sum())))
    return ids


def build(world: World, folder: Path) -> dict[str, str]:
    """Write the world: its policy, prompts and scorers; return the recipe's paths to them."""
    paths = {
        "model": str(folder / "policy"),
        "fit": str(folder / "fit.jsonl"),
        "test": str(folder / "test.jsonl"),
    }
    if not (folder / "policy" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in zip(("fit", "test"), prompts(), strict=True):
            lines = [json.dumps({"prompt": text}) for text in texts]
            Path(paths[name]).write_text("\n".join(lines) + "\n")
        _write_policy(world, folder / "policy")
    return paths


def _write_policy(world: World, folder: Path, batch_size: int = 128) -> None:
    """Train a Llama of two layers on the world's answers, and save it with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=world.width,
        intermediate_size=2 * world.width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="float32",
    )
    rng, texts = np.random.default_rng(21), [text for part in prompts() for text in part]
    torch.manual_seed(21)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=world.steps)
    for _ in range(world.steps):
        ids = torch.zeros(batch_size, 3 + LENGTH, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, prompt in enumerate(rng.choice(texts, batch_size)):
            answer = _answer(world, str(prompt), rng)
            ids[row, :3] = torch.tensor([VOCABULARY.index(word) for word in prompt.split()])
            ids[row, 3 : 3 + len(answer)] = torch.tensor(answer)
            labels[row, 3 : 3 + len(answer)] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    words = {word: k for k, word in enumerate(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token=END))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.eval().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token=END, eos_token=END).save_pretrained(
        folder
    )
