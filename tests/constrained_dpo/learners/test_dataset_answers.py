"""A dataset's responses in the pool: fits read them, estimates do not."""

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
from constrained_dpo.run.record import replay
from constrained_dpo.run.rounds import play_round
from data_prep.errors import UserError
from data_prep.files import hash_file
from data_prep.labels.pool import choose_responses
from data_prep.prompts.split import split_prompts
from data_prep.quickstart import PROMPTS, VOCABULARY, build_policy, helpful
from data_prep.sampling.enumeration import enumerate_responses, exact_logps
from data_prep.tables import read_parquet
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
    run = init_run(
        QUICKSTART,
        folder,
        [*SETTINGS, f"policy.model={build_policy()}", f"prompts.source={source}", *overrides],
    )
    recipe = run.recipe()
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, run, prompts)
    learner.policy = policy
    learner.restrict(recipe.fit.max_length)
    prepare(run, recipe, learner, left_out)
    return run, learner


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickstart_policy):
    """Prepared runs on the same prompts, by pool.source; `both` has played a round."""
    folder = tmp_path_factory.mktemp("pools")
    source = write_preferences(folder / "pku.jsonl", PROMPTS["train"][:12], 3)
    given = ("fit.labels=given", "fit.label_column=better_response_id")
    found = {
        "reference": prepared(folder / "reference", quickstart_policy, source),
        "both": prepared(
            folder / "both",
            quickstart_policy,
            source,
            "pool.source=both",
            "objective.reward.name=r",
        ),
        "dataset": prepared(
            folder / "dataset", quickstart_policy, source, "pool.source=dataset", *given
        ),
    }
    for name in ("both", "dataset"):
        play_round(found[name][0], found[name][0].recipe(), found[name][1])
    return {name: run for name, (run, _) in found.items()}


def test_answers_get_their_exact_reference_probability_and_scores(runs, quickstart_policy):
    run = runs["both"]
    table = read_parquet(run.dataset_pool_file)
    assert (
        (table["source"] == "dataset").all()
        and table["ended"].all()
        and table[["sample_logp", "policy_logp"]].isna().all(axis=None)
    )
    (eos,) = quickstart_policy.eos_ids
    column = {tuple(ids): i for i, ids in enumerate(enumerate_responses(eos, len(VOCABULARY)))}
    texts = run.prompts().set_index("prompt_id")["prompt"]
    pids = table["prompt_id"].unique()[:3]
    tokens = {pid: quickstart_policy.tokenizer(texts[pid])["input_ids"] for pid in pids}
    exact = dict(zip(pids, exact_logps(quickstart_policy, None, tokens), strict=True))
    some = table[table["prompt_id"].isin(pids)]
    expected = [exact[row.prompt_id][column[tuple(row.token_ids)]] for row in some.itertuples()]
    assert len(some) > 8 and np.allclose(some["ref_logp"], expected, atol=1e-4)
    assert np.allclose(
        table["r"], helpful(table["prompt_id"].map(texts).tolist(), table["response"].tolist())
    )
    counts = run.dataset_record()
    fit = run.prompts()["split"].ne("test").sum()
    assert (
        counts["responses"] == len(table)
        and counts["prompts"] == fit
        and counts["prompts_without"] == 0
    )
    assert counts["responses"] + counts["left_out"].get("repeated", 0) == 6 * fit


def test_estimates_come_from_samples_of_the_reference_policy_alone(runs):
    """λ_0 and the tables that baselines come from are those of a run without the dataset, to the
    bit."""
    reference, both = runs["reference"], runs["both"]
    assert both.state()["lambda"][0] == reference.state()["lambda"][0]
    ours, theirs = (
        read_parquet(run.reference_file).rename(columns={"r": "helpful"})
        for run in (both, reference)
    )
    pd.testing.assert_frame_equal(ours, theirs)
    ours, theirs = (
        read_parquet(run.pool_file(None)).rename(columns={"r": "helpful"})
        for run in (both, reference)
    )
    pd.testing.assert_frame_equal(ours, theirs)
    # A pool of the dataset alone: λ_0 from the dual prompts' samples, no sample on fit prompts
    # drawn.
    assert not runs["dataset"].pool_file(None).exists()
    assert hash_file(runs["dataset"].reference_file) == hash_file(reference.reference_file)
    assert (
        replay(both) == both.state()["lambda"]
        and replay(runs["dataset"]) == runs["dataset"].state()["lambda"]
    )


def test_the_fit_reads_all_sources_and_a_missing_part_is_an_error(runs, tmp_path):
    run = runs["both"]
    assert set(run.pool(1)["source"]) == {"reference-pool", "dataset", "round:0"}
    pairs = read_parquet(run.pairs_file(0))
    sources = run.pool(0).set_index("response_id")["source"]
    kinds = {
        (sources[a], sources[b])
        for a, b in zip(pairs["chosen_id"], pairs["rejected_id"], strict=True)
    }
    assert kinds == {
        (a, b) for a in ("dataset", "reference-pool") for b in ("dataset", "reference-pool")
    }
    log = json.loads((run.adapter_folder(0) / "training_log.json").read_text())["log"]
    assert np.isfinite(
        [row["kl"] for row in log if "kl" in row]
    ).all()  # over the samples among the rows
    moved = tmp_path / "dataset.parquet"
    run.dataset_pool_file.rename(moved)
    with pytest.raises(UserError, match=r"dataset\.parquet: no such file"):
        run.pool(0)
    moved.rename(run.dataset_pool_file)


def test_dataset_rows_are_refused_where_a_law_is_needed(runs):
    path = runs["both"].dataset_pool_file
    error = cdpo(
        "dual",
        "solve",
        path,
        "--reward",
        "r",
        "--constraint",
        "harmless=0.1",
        "--beta",
        "0.25",
        check=2,
    ).stderr
    assert "sample_logp" in error and "--assume-reference" in error


def test_given_labels_are_the_datasets_whatever_the_scores_say(runs):
    run = runs["dataset"]
    pairs, pool = read_parquet(run.pairs_file(0)), run.pool(0).set_index("response_id")
    rows = [json.loads(line) for line in Path(run.recipe().prompts.source).read_text().splitlines()]
    preferred = {
        (
            r["prompt"],
            r[f"response_{r['better_response_id']}"],
            r[f"response_{1 - r['better_response_id']}"],
        )
        for r in rows
    }
    texts = run.prompts().set_index("prompt_id")["prompt"]
    said = lambda ids: pool.loc[ids, "response"].tolist()
    found = set(
        zip(
            pairs["prompt_id"].map(texts),
            said(pairs["chosen_id"]),
            said(pairs["rejected_id"]),
            strict=True,
        )
    )
    assert found <= preferred and len(found) == len(pairs) > 15
    assert (
        (pairs["target"] == 1).all() and (pairs["margin"] < 0).any() and (pairs["margin"] > 0).any()
    )
    margin = (
        pool.loc[pairs["chosen_id"], "helpful"].to_numpy()
        - pool.loc[pairs["rejected_id"], "helpful"].to_numpy()
    )
    lambda_ = run.round_record(0)["lambda"]["harmless"]
    harmless = (
        pool.loc[pairs["chosen_id"], "harmless"].to_numpy()
        - pool.loc[pairs["rejected_id"], "harmless"].to_numpy()
    )
    assert np.allclose(pairs["margin"], margin + lambda_ * harmless)


def test_counts_are_shown_and_answers_are_taken_over(runs, tmp_path):
    run = runs["both"]
    assert (
        json.loads(cdpo("status", run.path, "--json", check=0).stdout)["dataset"]
        == run.dataset_record()
    )
    assert "the dataset's responses: " in cdpo("status", run.path, check=0).stdout
    taken = init_run(
        run.recipe_file, tmp_path / "run", ["objective.constraints.harmless.margin=0.2"], source=run
    )
    kept = read_parquet(taken.inherited_file("dataset"))
    assert (
        kept["ref_logp"].equals(read_parquet(run.dataset_pool_file)["ref_logp"]) and "r" not in kept
    )
    error = cdpo(
        "init",
        run.recipe_file,
        tmp_path / "x",
        "--from",
        run.path,
        "-s",
        "pool.source=dataset",
        check=2,
    ).stderr
    assert "pool.source differs" in error


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
    chosen = (
        choose_responses(pool, shares, None, **rule)
        .groupby(["prompt_id", "source"])
        .size()
        .unstack(fill_value=0)
    )
    assert (
        chosen.loc["a"].to_dict()
        == {"dataset": 4, "reference-pool": 4, "round:0": 8}
        == chosen.loc["b"].to_dict()
    )
    assert chosen.loc["c"].to_dict() == {"dataset": 0, "reference-pool": 4, "round:0": 8}
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
    (
        tmp_path / "quickstart"
    ).mkdir()  # a folder that happens to be called like the embedded world is not it
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
