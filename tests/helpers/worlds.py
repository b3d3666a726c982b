"""Random enumerable worlds for trials: the embedded world's policy and prompts with random rewards
and utilities, as python scorers.

`reward_1`, `utility_1a`, `utility_1b`, ... `reward_5`: sums over an answer's distinct words of
random weights that depend on the prompt's verb and object; the utilities pull against the reward.
Score std about 1 under the embedded policy; with `_x10` at the end, about 10.
"""

import functools

import numpy as np

from data_prep.quickstart import OBJECTS, VERBS, VOCABULARY

SEEDS = (1, 2, 3, 4, 5)


def _weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weight of every word, alone and beside every verb and object: one row of (1 + verbs +
    objects) per kind of neighbour."""
    parts = {"": 0.55, **dict.fromkeys(VERBS, 0.3), **dict.fromkeys(OBJECTS, 0.3)}
    return {key: scale * rng.normal(size=len(VOCABULARY)) for key, scale in parts.items()}


def _scorer(weights: dict[str, np.ndarray], scale: float = 1.0):
    @functools.cache
    def by_word(verb: str, thing: str) -> dict[str, float]:
        return dict(
            zip(VOCABULARY, (weights[""] + weights[verb] + weights[thing]).tolist(), strict=True)
        )

    # the exact tables ask for every answer to every prompt; askers make no difference
    @functools.cache
    def value(request: str, response: str) -> float:
        return scale * sum(
            map(by_word(*request.split()).__getitem__, dict.fromkeys(response.split())), 0.0
        )

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [
            value(prompt.partition(" ")[2], response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    return score


for _seed in SEEDS:
    _rng = np.random.default_rng(_seed)
    _reward = _weights(_rng)
    _tables = {f"reward_{_seed}": _reward}
    for _letter in "ab":
        _own = _weights(_rng)
        _tables[f"utility_{_seed}{_letter}"] = {
            key: 0.85 * _own[key] - 0.5 * _reward[key] for key in _own
        }
    for _name, _table in _tables.items():
        globals()[_name], globals()[f"{_name}_x10"] = _scorer(_table), _scorer(_table, 10.0)
