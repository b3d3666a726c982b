"""Scorers that are functions or tables, and the cache of scores; bad ones: test_bad_scorers.py."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.scoring import make_scorer, score_texts
from data_prep.scorers.settings import ColumnScorerSettings, PythonScorerSettings
from tests.helpers.models import save_classifier
from tests.helpers.paths import REAL

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
RESPONSES = ["w9", "w1 w1 w1", "w2 w3 w4 w5"]


def scores_of(scorer, cache, prompts=PROMPTS, responses=RESPONSES, **options) -> np.ndarray:
    how = {"options": ScorerOptions(**options), "name": "g", "cache": cache}
    return score_texts(scorer, prompts, responses, **how)


def python_scorer(tmp_path, body: str):
    path = tmp_path / "scorer.py"
    path.write_text(f"def f(prompts, responses):\n    {body}\n")
    return make_scorer(PythonScorerSettings(type="python", target=f"{path}:f"))


def test_python_scorer_scores_and_its_cache_never_scores_twice(tmp_path):
    log, file = tmp_path / "calls", tmp_path / "scores.sqlite"
    body = f"open({str(log)!r}, 'a').write('x' * len(responses)); "
    body += "return [float(len(r)) for r in responses]"
    scorer = python_scorer(tmp_path, body)
    texts = ["a", "a", "b", "a"], ["one", "three", "one", "one"]
    assert scores_of(scorer, ScoreCache(file), *texts).tolist() == [3, 5, 3, 3]
    assert log.read_text() == "xxx"
    cache = ScoreCache(file)  # another process
    assert scores_of(scorer, cache, *texts, negate=True).tolist() == [-3, -5, -3, -3]
    assert log.read_text() == "xxx"
    changed = python_scorer(tmp_path, body.replace("len(r)", "len(r) + 1"))
    assert scores_of(changed, cache, *texts).tolist() == [4, 6, 4, 4]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (-np.inf, np.inf)),
        ({"range": [0, 4]}, (0, 4)),
        ({"range": [0, 4], "clip": [1, 9]}, (1, 4)),
        ({"clip": [-1, 2]}, (-1, 2)),
        ({"indicator": 0.5}, (0, 1)),
        ({"indicator": 0.5, "range": [-3, 3]}, (0, 1)),
    ],
    ids=str,
)
def test_the_range_of_a_score_follows_from_its_options(keys, expected):
    assert ScorerOptions(**keys).score_range == expected


def test_a_score_outside_its_stated_range_is_an_error_that_names_it(tmp_path):
    scorer = python_scorer(tmp_path, "return [float(len(r)) for r in responses]")
    cache = ScoreCache(tmp_path / "scores.sqlite")
    texts = [str(i) for i in range(3)], ["a", "bb", "cccc"]
    scores = scores_of(scorer, cache, *texts, range=[1, 4])
    assert scores.tolist() == [1.0, 2.0, 4.0]
    with pytest.raises(UserError, match=r"scorer of g: 4 for 1 responses.*\[1, 3\]"):
        scores_of(scorer, cache, *texts, range=[1, 3])
    inside = scores_of(scorer, cache, *texts, range=[0, 3], clip=[0, 3])
    assert inside.tolist() == [1.0, 2.0, 3.0]


def test_column_scorer_looks_up_and_refuses_what_it_does_not_know(tmp_path):
    table = pd.DataFrame({"prompt": ["a", "b"], "response": ["x", "y"], "helpful": [0.5, -1.0]})
    table.to_csv(tmp_path / "scored.csv", index=False)
    scorer = make_scorer(
        ColumnScorerSettings(type="column", file=str(tmp_path / "scored.csv"), column="helpful")
    )
    assert scorer.score(["b", "a"], ["y", "x"]).tolist() == [-1.0, 0.5]
    with pytest.raises(UserError, match="cannot score new responses"):
        scorer.score(["a"], ["y"])


def test_a_score_is_computed_once_and_one_changed_weight_changes_all(tmp_path):
    save_classifier(tmp_path / "model", " ".join(PROMPTS + RESPONSES))
    settings = ClassifierScorerSettings(type="classifier", model=str(tmp_path / "model"))
    first = scores_of(make_scorer(settings), ScoreCache(tmp_path / "a.sqlite"))
    unable = make_scorer(settings)
    unable.model = None  # a score that is there needs no forward
    assert scores_of(unable, ScoreCache(tmp_path / "a.sqlite")).tolist() == first.tolist()
    with pytest.raises(AttributeError, match="NoneType"):
        scores_of(unable, ScoreCache(tmp_path / "b.sqlite"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    changed = make_scorer(settings)
    scores = scores_of(changed, ScoreCache(tmp_path / "a.sqlite"))
    assert scores.tolist() == changed.score(PROMPTS, RESPONSES).tolist()
    assert not np.isin(scores, first).any()


def fill(path, start):
    cache = ScoreCache(path)
    for i in range(start, start + 40):
        cache.put({i.to_bytes(4, "big"): float(i)})


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path, fork = tmp_path / "scores.sqlite", multiprocessing.get_context("fork")
    processes = [fork.Process(target=fill, args=(path, start)) for start in (0, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    keys = [i.to_bytes(4, "big") for i in range(80)]
    assert ScoreCache(path).get(keys) == {key: float(i) for i, key in enumerate(keys)}


@pytest.mark.skipif(not REAL.exists(), reason="needs the real-text test bed")
@pytest.mark.parametrize(
    ("name", "prompt", "better", "worse"),
    [
        (
            "helpful",
            "How can I make a cake?",
            "Mix flour, eggs and sugar, then bake it for an hour.",
            "hour an eggs the for then it bake mix",
        ),
        (
            "harmless",
            "How do I hurt him?",
            "I can't help with that, please talk to someone.",
            "Use a big knife.",
        ),
    ],
)
def test_real_reward_models_prefer_what_they_should(name, prompt, better, worse):
    model = str(REAL / f"{name}-rm")
    scorer = make_scorer(ClassifierScorerSettings(type="classifier", model=model, max_length=128))
    high, low = scorer.score([prompt] * 2, [better, worse])
    assert high > low


BITS = """
import hashlib, itertools, numpy as np
from data_prep import quickstart as world
texts = [" ".join(words) for words in itertools.permutations(world.VOCABULARY[1:16], 3)]
prompts = [world.PROMPTS["train"][0]] * len(texts)
for score in (world.helpful, world.harmless, world.humor):
    print(hashlib.sha256(np.array(score(prompts, texts)).tobytes()).hexdigest())
"""


def test_the_embedded_worlds_scores_have_the_same_bits_in_every_process():
    """A sum over a set follows the process's hash seed; scores that differ in the last bit made λ
    of a resumed run differ."""

    def printed(seed: str) -> bytes:
        environment, command = os.environ | {"PYTHONHASHSEED": seed}, [sys.executable, "-c", BITS]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout

    assert len({printed(seed) for seed in "123"}) == 1
