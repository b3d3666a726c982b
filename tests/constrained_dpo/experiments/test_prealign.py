"""Pre-alignment: a DPO adapter on a dataset's labels learns the reward that drew them."""

import json

import numpy as np
import pytest

from constrained_dpo.fit.checkpoints import SEAL
from data_prep.files import hold
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.quickstart import PROMPTS, VOCABULARY, helpful
from data_prep.sampling.enumeration import enumerate_responses, exact_logps
from tests.helpers.cli import cdpo, kill_when
from tests.helpers.moments import interrupt, when
from tests.helpers.paths import QUICKSTART, REAL
from tests.helpers.tables import write_preferences

SETTINGS = [
    "prompts.test=0.4",
    "sampling.batch_size=256",
    "fit.max_length=16",
    "fit.learning_rate=5e-3",
    "fit.batch_size=16",
    "fit.steps=30",
    "fit.save_steps=5",
    "policy.quantization=none",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """`cdpo prealign` on labels of a Bradley-Terry model of 8 · helpful, but for its folder."""
    source = write_preferences(
        tmp_path_factory.mktemp("labels") / "pku.jsonl",
        [*PROMPTS["train"], *PROMPTS["test"]][:56],
        10,
        scale=8.0,
    )
    settings = [word for s in (*SETTINGS, f"prompts.source={source}") for word in ("-s", s)]
    return ["prealign", str(QUICKSTART), "--labels", "better_response_id", *settings]


@pytest.fixture(scope="module")
def prealigned(words, tmp_path_factory):
    """(folder of the adapter, printed JSON, stderr) of the command."""
    folder = tmp_path_factory.mktemp("prealign")
    stale = folder / ".helpful.prealign"
    # what a call with other labels left; it must not become the adapter
    (stale / "adapter").mkdir(parents=True)
    (stale / "identity.json").write_text(json.dumps({"labels": "safer_response_id"}))
    done = cdpo(*words, "-s", "fit.holdout=0.1", folder / "helpful", "--json", check=0)
    return folder / "helpful", json.loads(done.stdout), done.stderr


def test_facts_are_written_and_say_what_was_left_out(prealigned):
    folder, printed, stderr = prealigned
    facts = json.loads((folder / "prealign.json").read_text())
    assert facts == {key: value for key, value in printed.items() if key != "output"}
    assert facts["labels"] == facts["fit"]["label_column"] == "better_response_id"
    assert facts["fit"]["labels"] == "given" and facts["beta"] == 0.25 and facts["seed"] == 0
    assert "holdout" not in facts["fit"] and "fit.holdout not used" in stderr
    left_out = facts["answers"]["left_out"]
    rows = 10 * facts["prompts"]["fit"]
    assert facts["pairs"] + left_out["rows"] + left_out.get("repeated_rows", 0) == rows
    assert not (folder.parent / ".helpful.prealign").exists()
    assert (folder / "adapter_config.json").exists()
    log = json.loads((folder / "training_log.json").read_text())
    assert log["anchor_error"] < 1e-3  # log π_ref of the answers, against the untrained adapter


def test_implicit_margins_order_pairs_of_unseen_prompts(prealigned):
    """β·log π/π_ref over all answers to prompts that the fit never saw, from exact tables, against
    the reward that drew the labels."""
    folder, facts, _ = prealigned
    agreement = facts["agreement"]["test"]
    assert agreement["pairs"] > 100 and agreement["margin"] > 0
    assert agreement["low"] > 0.5 and agreement["low"] < agreement["share"] < agreement["high"]
    policy = load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
    unseen = [*PROMPTS["train"], *PROMPTS["test"]][56:60]
    tokens = {prompt: policy.tokenizer(prompt)["input_ids"] for prompt in unseen}
    implicit = exact_logps(policy, folder, tokens) - exact_logps(policy, None, tokens)
    sequences = enumerate_responses(policy.eos_ids[0], len(VOCABULARY))
    texts = policy.tokenizer.batch_decode(sequences, skip_special_tokens=True)
    short = [i for i, ids in enumerate(sequences) if len(ids) < 4 and ids[-1] == policy.eos_ids[0]]
    rng, agree = np.random.default_rng(0), []
    for row, prompt in zip(implicit, unseen, strict=True):
        first, second = rng.choice(short, (2, 400))
        reward = np.array(helpful([prompt] * len(texts), texts))
        apart = np.abs(reward[first] - reward[second]) > 0.5
        agree.append(((row[first] > row[second]) == (reward[first] > reward[second]))[apart].mean())
    assert min(agree) > 0.6 and np.mean(agree) > 0.7


def test_what_cannot_be_fitted_is_refused(words, prealigned, refused, tmp_path):
    source = ["-s", words[-1]]  # prompts.source
    command = ["prealign", QUICKSTART, tmp_path / "a"]
    refused(*command, match="which label?")
    refused(*words, prealigned[0], match="exists already")
    no_column = "line 1: no `safer_response_id`"
    refused(*command, *source, "--labels", "safer_response_id", match=no_column)
    refused(*command, "--labels", "chosen", match="row 1: no answers beside the prompt")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_call_that_ended_early_is_finished_by_the_same_call_and_holds_its_folder(
    words, prealigned, tmp_path, refused, how
):
    """Stopped as by Ctrl-C, or killed, while log π_ref is taken and between two checkpoints of the
    fit; the adapter is then that of a call that went through."""
    work, output = tmp_path / ".again.prealign", tmp_path / "again"
    scored = lambda: any((work / "shards").rglob("*.parquet"))
    saved = lambda: any(work.glob(f".checkpoints/*/{SEAL}"))
    for moment in (scored, saved):
        if how == "killed":
            assert kill_when([*words, str(output)], moment), "it ended before it was killed"
        else:
            with when(moment, interrupt):
                cdpo(*words, output, check=130)
        assert not output.exists()
    with hold(work):
        refused(*words, output, match="is being worked on by process")
    assert "goes on from checkpoint-" in cdpo(*words, output, check=0).stderr
    assert not work.exists()
    for name in ("adapter_model.safetensors", "prealign.json"):
        assert (output / name).read_bytes() == (prealigned[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the real-text test bed")
def test_real_hh_rows_are_fitted(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: hh\npolicy: {{model: {REAL / 'policy'}, dtype: float32, quantization: none}}\n"
        f"prompts: {{source: {REAL / 'hh_harmless_test.jsonl.gz'}, test: 0.1, format: chat, "
        f"max_fit: 40, max_test: 8, too_long: drop}}\n"
        "sampling: {max_new_tokens: 16, batch_size: 16}\n"
        "objective: {beta: 0.1, reward: {name: r, scorer: {type: python, target: "
        "'math:nothing'}}, constraints: []}\n"
        "fit: {steps: 5, batch_size: 4, learning_rate: 3e-3, max_length: 96, warmup_steps: 0}\n"
    )
    words = ["prealign", recipe, tmp_path / "out", "--labels", "chosen", "--json"]
    facts = json.loads(cdpo(*words, check=0).stdout)
    left_out, kept = facts["answers"]["left_out"], facts["pairs"]
    rows = kept + left_out.get("rows", 0) + left_out.get("repeated_rows", 0)
    assert kept > 10 and rows >= facts["prompts"]["fit"] and left_out["too_long"] > 0
    agreement = facts["agreement"]
    assert agreement["fit"]["share"] > 0.55 and agreement["test"]["pairs"] > 0
