"""Small tables and enumerable worlds."""

import json

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.quickstart import VOCABULARY, helpful
from tests.helpers.paths import DATA


def random_world(
    seed: int,
    num_constraints: int = 1,
    prompts: int = 12,
    responses: int = 200,
    beta: float = 0.5,
    margin: float = 0.4,
) -> TabularWorld:
    """An enumerated world with tension: every utility is negatively correlated with the reward."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(prompts, responses)) * 1.5
    ref_logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    reward = rng.normal(size=(prompts, responses))
    names = [f"g{i}" for i in range(num_constraints)]
    utilities = {n: -0.6 * reward + 0.8 * rng.normal(size=reward.shape) for n in names}
    problem = ConstrainedProblem("r", beta, tuple(Constraint(n, margin=margin) for n in names))
    return TabularWorld(problem, ref_logp, reward, utilities)


def scored_frame(
    seed: int, prompts: int, responses: int, names: tuple[str, ...] = ("r", "g")
) -> pd.DataFrame:
    """A small scored responses table (ids and scores only)."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(prompts), responses)
    frame = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in ids], "response_id": [f"y{i}" for i in range(len(ids))]}
    )
    return frame.assign(**{n: rng.normal(size=len(ids)) for n in names})


def rows_of(name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


WORDS = [word for word in VOCABULARY if word.isalpha()]


def write_preferences(path, prompts: list[str], per_prompt: int, scale: float = 2.0) -> str:
    """PKU-SafeRLHF rows on the embedded world: random answers, `better_response_id` drawn from
    Bradley-Terry of scale · `helpful`."""
    rng, rows = np.random.default_rng(0), []
    for prompt in prompts:
        for _ in range(per_prompt):
            first, second = (" ".join(rng.choice(WORDS, rng.integers(1, 3))) for _ in range(2))
            worse = scale * (helpful([prompt], [first])[0] - helpful([prompt], [second])[0])
            label = int(rng.random() < 1 / (1 + np.exp(worse)))
            rows.append(
                {
                    "prompt": prompt,
                    "response_0": first,
                    "response_1": second,
                    "better_response_id": label,
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
