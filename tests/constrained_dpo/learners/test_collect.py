"""Samples by shard: prompts of like length together, the table in the prompts' order."""

import dataclasses

import pandas as pd
import pytest

from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from data_prep.quickstart import PROMPTS
from data_prep.readers.tables import read_parquet
from tests.helpers.paths import QUICKSTART

WORDS = [1, 4, 2, 3, 1, 4, 2]  # of each prompt, in quickstart requests


@pytest.fixture(scope="module")
def learner(quickstart_policy, tmp_path_factory) -> LoraLearner:
    file = tmp_path_factory.mktemp("scorers") / "scorers.py"
    file.write_text(
        "def letters(prompts, responses):\n    return [float(len(r)) for r in responses]"
    )
    places = ("reward", "constraints.0")
    scorers = [f"objective.{place}.scorer.target={file}:letters" for place in places]
    texts = [" ".join(PROMPTS["train"][n : n + count]) for n, count in enumerate(WORDS)]
    names = [f"p{n}" for n in range(len(texts))]
    prompts = pd.DataFrame({"prompt_id": names, "prompt": texts, "split": "dual"})
    learner = LoraLearner(load_recipe(QUICKSTART, scorers), prompts, None)
    learner.policy = quickstart_policy
    learner.keep_tokens()
    return learner


@pytest.fixture
def job(tmp_path) -> Collection:
    return Collection(
        phase="dual",
        folder=tmp_path / "shards",
        source="reference",
        responses_per_prompt=3,
        shard_size=6,
        objectives=["helpful", "harmless"],
        seed=0,
        rule=None,
    )


def test_prompts_of_like_length_share_a_shard_and_the_table_keeps_their_order(learner, job):
    table = collect(learner, learner.prompts, job)
    names = list(learner.prompts["prompt_id"])
    assert list(table["prompt_id"]) == [name for name in names for _ in range(3)]
    shards = [read_parquet(path)["prompt_id"].unique() for path in sorted(job.folder.iterdir())]
    assert [list(ids) for ids in shards] == [["p1", "p5"], ["p3", "p2"], ["p6", "p0"], ["p4"]]
    alone = collect(learner, learner.prompts.iloc[[3, 2]], other(job, "alone"))
    assert list(alone["prompt_id"].unique()) == ["p3", "p2"]


def test_a_killed_collection_goes_on_to_the_same_table(learner, job):
    table = collect(learner, learner.prompts, job)
    (job.folder / "00002.parquet").unlink()
    again = collect(learner, learner.prompts, job)
    pd.testing.assert_frame_equal(again, table)


def test_prompts_without_kept_tokens_are_as_long_as_their_text(learner, job):
    texts = learner.prompts["prompt"].mask(learner.prompts["prompt_id"] == "p2", "a " * 99)
    prompts = learner.prompts.assign(prompt=texts).drop(columns="token_ids")
    table = collect(learner, prompts, job)
    first = read_parquet(job.folder / "00000.parquet")
    assert first["prompt_id"].iloc[0] == "p2"
    assert list(table["prompt_id"].iloc[::3]) == list(learner.prompts["prompt_id"])


def test_shards_of_other_prompts_are_refused(learner, job):
    collect(learner, learner.prompts, job)
    with pytest.raises(UserError, match="holds shards of other prompts"):
        collect(learner, learner.prompts.iloc[:6], job)


def other(job: Collection, name: str) -> Collection:
    return dataclasses.replace(job, folder=job.folder.with_name(name))
