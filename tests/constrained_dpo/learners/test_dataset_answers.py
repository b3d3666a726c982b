"""A dataset's responses in the pool: fits read them, estimates do not."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import RoundRecord, replay
from constrained_dpo.run.rounds import play_round
from data_prep.errors import UserError
from data_prep.files import hash_file
from data_prep.labels.pool import choose_responses
from data_prep.prompts.split import split_prompts
from data_prep.quickstart import PROMPTS, VOCABULARY, build_policy, helpful
from data_prep.readers.tables import read_parquet
from data_prep.sampling.enumeration import enumerate_responses, exact_logps
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART
from tests.helpers.tables import write_preferences

SETTINGS = (
    "prompts.test=0.4",
    "sampling.responses_per_prompt=4",
    "dual.responses_per_prompt=8",
    "sampling.batch_size=64",
    "fit.steps=2",
)
SETTINGS += ("fit.warmup_steps=0",)


def prepared(folder, policy, source: str, *overrides: str) -> tuple[RunDirectory, LoraLearner]:
    # the model by its folder: nothing is enumerated, which would take most of the time
    model, prompts = f"policy.model={build_policy()}", f"prompts.source={source}"
    run = init_run(QUICKSTART, folder, [*SETTINGS, model, prompts, *overrides])
    recipe = run.recipe()
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, prompts, run.score_cache)
    learner.policy = policy
    learner.restrict(recipe.fit.max_length)
    prepare(run, recipe, learner, left_out)
    return run, learner


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickstart_policy) -> dict[str, RunDirectory]:
    """Prepared runs on the same prompts, by pool.source; `both` and `dataset` have played a
    round."""
    folder = tmp_path_factory.mktemp("pools")
    source = write_preferences(folder / "pku.jsonl", PROMPTS["train"][:12], 3)
    overrides = {
        "reference": (),
        "both": ("pool.source=both", "objective.reward.name=r"),
        "dataset": (
            "pool.source=dataset",
            "fit.labels=given",
            "fit.label_column=better_response_id",
        ),
    }
    played = {}
    for name, settings in overrides.items():
        run, learner = prepared(folder / name, quickstart_policy, source, *settings)
        if name != "reference":
            play_round(run, run.recipe(), learner)
        played[name] = run
    return played


def test_answers_get_their_exact_reference_probability(runs, quickstart_policy):
    run = runs["both"]
    table = read_parquet(run.dataset_pool_file)
    assert (table["source"] == "dataset").all() and table["ended"].all()
    assert table[["sample_logp", "policy_logp"]].isna().all(axis=None)
    (eos,) = quickstart_policy.eos_ids
    column = {tuple(ids): i for i, ids in enumerate(enumerate_responses(eos, len(VOCABULARY)))}
    texts = run.prompts().set_index("prompt_id")["prompt"]
    pids = table["prompt_id"].unique()[:3]
    tokens = {pid: quickstart_policy.tokenizer(texts[pid])["input_ids"] for pid in pids}
    exact = dict(zip(pids, exact_logps(quickstart_policy, None, tokens), strict=True))
    few = table[table["prompt_id"].isin(pids)]
    expected = [exact[row.prompt_id][column[tuple(row.token_ids)]] for row in few.itertuples()]
    assert len(few) > 8 and np.allclose(few["ref_logp"], expected, atol=1e-4)


def test_answers_are_scored_and_counted(runs):
    run = runs["both"]
    table, prompts = read_parquet(run.dataset_pool_file), run.prompts()
    texts = table["prompt_id"].map(prompts.set_index("prompt_id")["prompt"]).tolist()
    assert np.allclose(table["r"], helpful(texts, table["response"].tolist()))
    counts, fit = run.dataset_record(), int(prompts["split"].ne("test").sum())
    assert (counts["prompts"], counts["prompts_without"]) == (fit, 0)
    assert counts["responses"] == len(table)
    assert counts["responses"] + counts["left_out"].get("repeated", 0) == 6 * fit


def test_estimates_come_from_samples_of_the_reference_policy_alone(runs):
    """λ_0 and the tables that baselines come from are those of a run without the dataset, to the
    bit."""
    reference, both, dataset = (runs[name] for name in ("reference", "both", "dataset"))
    assert both.state().lambda_[0] == reference.state().lambda_[0]
    for file in (lambda run: run.reference_file, lambda run: run.pool_file(None)):
        ours = read_parquet(file(both)).rename(columns={"r": "helpful"})
        pd.testing.assert_frame_equal(ours, read_parquet(file(reference)))
    # A pool of the dataset alone: λ_0 from the dual prompts' samples, no sample on fit prompts
    # drawn.
    assert not dataset.pool_file(None).exists()
    assert hash_file(dataset.reference_file) == hash_file(reference.reference_file)
    for run in (both, dataset):
        assert replay(run) == run.state().lambda_


def test_the_fit_reads_all_sources(runs):
    run, kinds = runs["both"], {"dataset", "reference-pool"}
    assert set(run.pool(run.recipe(), 1)["source"]) == kinds | {"round:0"}
    pairs = read_parquet(run.pairs_file(0))
    source = run.pool(run.recipe(), 0).set_index("response_id")["source"]
    sides = (pairs[column].map(source) for column in ("chosen_id", "rejected_id"))
    assert set(zip(*sides, strict=True)) == set(itertools.product(kinds, repeat=2))
    log = json.loads((run.adapter_folder(0) / "training_log.json").read_text())["log"]
    kls = [row["kl"] for row in log if "kl" in row]  # over the samples among the rows
    assert kls and np.isfinite(kls).all()


def test_a_missing_source_is_an_error(runs, tmp_path):
    file = runs["both"].dataset_pool_file
    moved = file.rename(tmp_path / "dataset.parquet")
    with pytest.raises(UserError, match=r"dataset\.parquet: no such file"):
        runs["both"].pool(runs["both"].recipe(), 0)
    moved.rename(file)


def test_dataset_rows_are_refused_where_a_law_is_needed(runs):
    path = runs["both"].dataset_pool_file
    options = ["--reward", "r", "--constraint", "harmless=0.1", "--beta", "0.25"]
    error = cdpo("dual", "solve", path, *options, check=2).stderr
    assert "sample_logp" in error and "--assume-reference" in error


def test_given_labels_are_the_datasets_whatever_the_scores_say(runs):
    run = runs["dataset"]
    pairs, pool = (
        read_parquet(run.pairs_file(0)),
        run.pool(run.recipe(), 0).set_index("response_id"),
    )
    rows = [json.loads(line) for line in Path(run.recipe().prompts.source).read_text().splitlines()]
    preferred = set()
    for row in rows:
        better = row["better_response_id"]
        preferred.add((row["prompt"], row[f"response_{better}"], row[f"response_{1 - better}"]))
    texts = run.prompts().set_index("prompt_id")["prompt"]
    chosen, rejected = (pool.loc[pairs[name]] for name in ("chosen_id", "rejected_id"))
    columns = pairs["prompt_id"].map(texts), chosen["response"], rejected["response"]
    labelled = set(zip(*columns, strict=True))
    assert labelled <= preferred and len(labelled) == len(pairs) > 15
    assert (pairs["target"] == 1).all()
    assert (pairs["margin"] < 0).any() and (pairs["margin"] > 0).any()
    lambda_ = RoundRecord.read(run.round_file(0)).lambda_["harmless"]
    score = pool["helpful"] + lambda_ * pool["harmless"]
    margin = score[pairs["chosen_id"]].to_numpy() - score[pairs["rejected_id"]].to_numpy()
    assert np.allclose(pairs["margin"], margin)


def test_counts_are_shown(runs):
    run = runs["both"]
    status = json.loads(cdpo("status", run.path, "--json", check=0).stdout)
    assert status["dataset"] == run.dataset_record()
    assert "the dataset's responses: " in cdpo("status", run.path, check=0).stdout


def test_answers_are_taken_over_by_a_run_with_the_same_source(runs, tmp_path):
    run, override = runs["both"], "objective.constraints.harmless.margin=0.2"
    taken = init_run(run.recipe_file, tmp_path / "run", [override], source=run)
    kept = read_parquet(taken.inherited_file("dataset"))
    assert kept["ref_logp"].equals(read_parquet(run.dataset_pool_file)["ref_logp"])
    assert "r" not in kept
    with pytest.raises(UserError, match=r"pool\.source differs"):
        init_run(run.recipe_file, tmp_path / "x", ["pool.source=dataset"], source=run)


def test_shares_of_the_dataset():
    rng = np.random.default_rng(0)
    counts = {"reference-pool": 8, "dataset": 4, "round:0": 8}
    sources = [source for source, number in counts.items() for _ in range(number)] * 3
    pool = pd.DataFrame(
        {
            "prompt_id": np.repeat(["a", "b", "c"], 20),
            "response_id": [f"y{i}" for i in range(60)],
            "source": sources,
        }
    )
    pool = pool.assign(r=rng.normal(size=60), policy_logp=np.nan, ref_logp=-1.0)
    pool = pool[~((pool["prompt_id"] == "c") & (pool["source"] == "dataset"))]
    shares = {"reference": 0.25, "dataset": 0.25, "recent": 0.5, "hard": 0.0, "earlier": 0.0}
    rule = {
        "reward": "r",
        "lambda_": pd.Series(dtype=float),
        "beta": 0.1,
        "seed": 0,
        "round_number": 1,
    }
    chosen = choose_responses(pool, shares, None, **rule)
    sizes = chosen.groupby(["prompt_id", "source"]).size().unstack(fill_value=0)
    for prompt, dataset in (("a", 4), ("b", 4), ("c", 0)):
        expected = {"dataset": dataset, "reference-pool": 4, "round:0": 8}
        assert sizes.loc[prompt].to_dict() == expected
    alone = {"reference": 0.0, "dataset": 1.0, "recent": 0.0, "hard": 0.0, "earlier": 0.0}
    assert set(choose_responses(pool, alone, None, **rule)["prompt_id"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            ["pool.shares={reference: 0.5, dataset: 0.5}"],
            r"pool.shares.dataset is 0.5, but pool.source reference has no such",
        ),
        (
            ["pool.source=both", "pool.shares={reference: 0.5, recent: 0.5}"],
            r"pool.shares.dataset is 0, but pool.source both has such",
        ),
        (
            ["pool.source=dataset", "pool.shares={reference: 0.5, dataset: 0.5}"],
            r"pool.shares.reference is 0.5, but pool.source dataset",
        ),
        (["fit.labels=given"], "given and fit.label_column need each other"),
        (["fit.label_column=better_response_id"], "given and fit.label_column need each other"),
        (["fit.labels=given", "fit.label_column=x"], "set pool.source: dataset"),
        (
            ["fit.labels=given", "fit.label_column=x", "pool.source=both", "pool.max_per_prompt=4"],
            "drop pool.shares and",
        ),
        (
            ["fit.labels=given", "fit.label_column=x", "pool.source=both", "fit.holdout=0.1"],
            "is not what fit.labels: given fits",
        ),
        (["fit.labels=given", "fit.label_column=x", "fit.loss=listwise"], "given is about pairs"),
    ],
)
def test_keys_are_validated_together(overrides, match):
    with pytest.raises(UserError, match=match):
        load_recipe(QUICKSTART, overrides)


def test_a_datasets_folder_is_found_beside_the_recipe(tmp_path):
    recipe = yaml.safe_load(QUICKSTART.read_text())
    (tmp_path / "rows").mkdir()
    recipe["prompts"] |= {
        "source": {"dataset": "rows"},
        "test": {"dataset": "quickstart", "split": "test"},
    }
    # A folder that happens to be called like the embedded world is not it.
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    prompts = load_recipe(tmp_path / "recipe.yaml").prompts
    assert (prompts.source.dataset, prompts.test.dataset) == (
        str((tmp_path / "rows").resolve()),
        "quickstart",
    )


def test_a_source_of_prompts_alone_is_refused_before_anything_is_trained(refused):
    refused(
        "check",
        QUICKSTART,
        "--no-pilot",
        "-s",
        "pool.source=dataset",
        match="row 1: no answers beside the prompt",
    )
