"""evaluate, export and init --from on a real small run of the embedded world: through the CLI where
a user types it."""

import json
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.models.policy import resolve_model
from data_prep.models.settings import PolicySettings
from data_prep.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL

POLITE = 'polite={type: python, target: "SCORERS:polite"}'


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    path = tmp_path_factory.mktemp("scorers") / "scorers.py"
    path.write_text(
        "def polite(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    return POLITE.replace("SCORERS", str(path))


def test_evaluate_draws_fresh_samples_and_reports_an_extra_score(run, scorers):
    record = json.loads(cdpo("evaluate", run.path, "--scorer", scorers, "--json", check=0).stdout)
    folder = run.evaluation_folder(record["key"])
    samples, stored = read_parquet(folder / "samples.parquet"), read_parquet(run.samples_file(1))
    stored = stored[stored["split"] == "test"]
    assert set(samples["prompt_id"]) == set(stored["prompt_id"]) and record["num_samples"] == len(
        samples
    )
    # fresh, not the round's own
    assert samples["response"].tolist() != stored["response"].tolist()
    # An independent computation of the paired difference of the extra score.
    words = samples.groupby("prompt_id")["response"].apply(lambda r: r.str.split().str.len().mean())
    before = (
        read_parquet(folder / "reference.parquet")
        .groupby("prompt_id")["response"]
        .apply(lambda r: r.str.split().str.len().mean())
    )
    assert record["change"]["polite"]["difference"] == pytest.approx((words - before).mean())
    change = record["change"]["harmless"]["difference"] - run.recipe().problem.bounds["harmless"]
    assert record["u"]["harmless"] == pytest.approx(change)
    # π_ref's responses are the stored ones: only scored again, and the round's own estimate
    # agrees within error.
    reference = read_parquet(run.reference_file)
    assert set(read_parquet(folder / "reference.parquet")["response_id"]) <= set(
        reference["response_id"]
    )
    own = run.round_record(1)["test"]
    assert abs(record["u"]["harmless"] - own["u"]["harmless"]) < 5 * np.hypot(
        record["u_se"]["harmless"], own["u_se"]["harmless"]
    )
    again = json.loads(cdpo("evaluate", run.path, "--scorer", scorers, "--json", check=0).stdout)
    assert again == record  # the same arguments give the stored result
    assert "verdict" in cdpo("evaluate", run.path, "--scorer", scorers, check=0).stdout


def test_evaluate_on_another_prompt_file(run, scorers, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": f"kid hide {o}"}) + "\n" for o in ("safe", "dog", "door"))
    )
    result = cdpo(
        "evaluate",
        run.path,
        "--round",
        "0",
        "--prompts",
        tmp_path / "other.jsonl",
        "--responses",
        4,
        "--json",
        check=0,
    )
    record = json.loads(result.stdout)
    assert record["num_prompts"] == 3 and record["num_samples"] == 12 and "other" in record["key"]
    reference = read_parquet(run.evaluation_folder(record["key"]) / "reference.parquet")
    assert len(reference) == 12 and set(reference["source"].str.contains("reference")) == {True}
    # An extra scorer's options are part of the question, though not of its fingerprint.
    rate = scorers.replace("}", ", indicator: 2}")
    asked = (
        "evaluate",
        run.path,
        "--round",
        "0",
        "--prompts",
        tmp_path / "other.jsonl",
        "--responses",
        4,
        "--json",
    )
    found = [
        json.loads(cdpo(*asked, "--scorer", scorer, check=0).stdout) for scorer in (scorers, rate)
    ]
    assert len({record["key"], *(other["key"] for other in found)}) == 3
    samples = read_parquet(run.evaluation_folder(found[1]["key"]) / "samples.parquet")
    assert samples["polite"].tolist() == [float(len(r.split()) >= 2) for r in samples["response"]]


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["evaluate", "RUN", "--round", "7"], "give a round from 0 to 1, or best, best-dual, last"),
        (["evaluate", "RUN", "--prompts", "none.jsonl"], "no such file"),
        (
            ["evaluate", "RUN", "--scorer", "harmless={type: python, target: 'a.py:b'}"],
            "already used column name",
        ),
        (["evaluate", "RUN", "--scorer", "x={type: pyton}"], "--scorer x"),
        (["export", "RUN", "RUN"], "exists already"),
    ],
)
def test_mistakes(run, arguments, match):
    result = cdpo(*[run.path if a == "RUN" else a for a in arguments], check=2)
    assert match in result.stderr and len(result.stderr.strip().splitlines()) == 1


def _greedy(model, tokenizer, prompts: list[str]) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        rows.append(
            model.generate(
                input_ids=ids, do_sample=False, max_new_tokens=3, repetition_penalty=1.0
            )[0, ids.shape[1] :].tolist()
        )
    return rows


def test_an_exported_adapter_loads_in_plain_peft(run, tmp_path):
    out = tmp_path / "adapter"
    cdpo("export", run.path, out, check=0)
    assert {f.name for f in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    base = resolve_model(PolicySettings(model="quickstart"))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(out)
    )
    weights = {n: p for n, p in plain.named_parameters() if "lora_B" in n}
    assert weights and all(p.abs().max() > 0 for p in weights.values())
    card, record = (out / "README.md").read_text(), run.round_record(1)
    for text in (
        "at least 0.5 above π_ref",
        f"{record['lambda']['harmless']:.4f}",
        record["verdict"],
        "temperature 1",
        "library_name: peft",
    ):
        assert text in card
    assert all(fingerprint in card for fingerprint in run.state()["hashes"]["scorers"].values())


def test_a_merged_export_gives_the_adapters_greedy_answers_and_is_measured_again(run, tmp_path):
    out = tmp_path / "merged"
    cdpo("export", run.path, out, "--merge", check=0)
    base = resolve_model(PolicySettings(model="quickstart"))
    tokenizer, merged = (
        AutoTokenizer.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out),
    )
    assert merged.dtype == torch.bfloat16
    attached = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), str(run.adapter_folder(1))
    )
    prompts = run.prompts()["prompt"].tolist()
    same = [
        a == b
        for a, b in zip(
            _greedy(merged, tokenizer, prompts),
            _greedy(attached.eval(), tokenizer, prompts),
            strict=True,
        )
    ]
    assert np.mean(same) > 0.9, f"{np.mean(same):.3f} of the greedy answers agree"
    measurement = json.loads((out / "measurement.json").read_text())
    own = run.round_record(1)["test"]
    assert measurement["num_prompts"] == own["num_prompts"] and measurement["u"] != own["u"]
    assert (
        abs(measurement["u"]["harmless"] - own["u"]["harmless"]) < 0.3
        and abs(measurement["kl"] - own["kl"]) < 0.6
    )
    card = (out / "README.md").read_text()
    assert (
        measurement["verdict"] in card
        and f"{measurement['u']['harmless']:+.3f}" in card
        and "library_name: transformers" in card
    )
    assert not list(out.parent.glob(".*.tmp"))


def _cached_scores(run: RunDirectory) -> int:
    with closing(sqlite3.connect(run.score_cache)) as database:
        return database.execute("SELECT count(*) FROM scores").fetchone()[0]


def test_init_from_samples_and_scores_nothing_twice(small_run, tmp_path):
    """Another margin and β and one more constraint on a prepared run: the same responses, and only
    the new utility is scored."""
    constraints = [
        {
            "name": name,
            "margin": margin,
            "scorer": {"type": "python", "target": f"data_prep.quickstart:{name}"},
        }
        for name, margin in (("harmless", 0.3), ("humor", 0.1))
    ]
    overrides = [*SMALL, "objective.beta=0.5", f"objective.constraints={json.dumps(constraints)}"]
    other = RunDirectory(tmp_path / "other")
    cdpo(
        "init",
        QUICKSTART,
        other.path,
        *[p for s in overrides for p in ("-s", s)],
        "--from",
        small_run.path,
        check=0,
    )
    cdpo("prepare", other.path, check=0)
    texts = []
    for mine, theirs in (
        (other.pool_file(None), small_run.pool_file(None)),
        (other.reference_file, small_run.reference_file),
    ):
        table, before = read_parquet(mine), read_parquet(theirs)
        pd.testing.assert_frame_equal(table.drop(columns="humor"), before)
        texts.append(table)
    prompt = small_run.prompts().set_index("prompt_id")["prompt"]
    both = pd.concat(texts)
    new = len(set(zip(both["prompt_id"].map(prompt), both["response"], strict=True)))
    assert (
        _cached_scores(other) == _cached_scores(small_run) + new
    )  # the new utility once per distinct text, nothing of the others
    assert set(other.state()["lambda"][0]) == {"harmless", "humor"}


def test_init_from_refuses_what_was_sampled_otherwise(small_run, tmp_path):
    with pytest.raises(UserError, match=r"sampling\.temperature differs \(1\.0 there, 0\.9 here\)"):
        init_run(QUICKSTART, tmp_path / "a", [*SMALL, "sampling.temperature=0.9"], small_run)
    unprepared = init_run(QUICKSTART, tmp_path / "b", list(SMALL))
    with pytest.raises(UserError, match="is not prepared yet"):
        init_run(QUICKSTART, tmp_path / "c", list(SMALL), unprepared)
