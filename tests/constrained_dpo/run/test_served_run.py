"""A run whose responses come from a completions server: its record, its certificate, its check."""

import json
import shutil

import pandas as pd
import pytest
import yaml

import data_prep.http
from constrained_dpo.check.check import check_recipe
from constrained_dpo.check.servers import adapts_head, server_warnings
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import RoundRecord, RoundTables, replay, round_record
from constrained_dpo.run.rounds import play_round
from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.prompts.split import split_prompts
from data_prep.scorers.settings import HttpScorerSettings
from tests.helpers.completion_server import Faults, completion_server
from tests.helpers.models import save_tiny_causal_lm
from tests.helpers.served import load_base

SERVER = "CDPO_TEST_SERVER"

SCORERS = """
def f(p, r): return [len(x.split()) for x in r]
def g(p, r): return [x.count('1') for x in r]
"""


def write_recipe(folder, model):
    (folder / "scorers.py").write_text(SCORERS)
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    scorer = lambda name: {"type": "python", "target": f"{folder}/scorers.py:{name}"}
    recipe = {
        "name": "served",
        "policy": {"model": str(model), "quantization": "none", "dtype": "float32"},
        "prompts": {"source": str(folder / "prompts.jsonl"), "test": 0.4, "template": "{prompt}"},
        "sampling": {
            "responses_per_prompt": 4,
            "max_new_tokens": 6,
            "batch_size": 32,
            "backend": "openai",
            "server": {"base_url": f"${SERVER}", "model": "base", "shard_size": 32},
        },
        "objective": {
            "beta": 5.0,
            "reward": {"name": "f", "scorer": scorer("f")},
            "constraints": [{"name": "g", "margin": 0.1, "scorer": scorer("g")}],
        },
        "dual": {"prompts_per_round": 4, "responses_per_prompt": 8},
        "fit": {"steps": 2, "batch_size": 4, "max_length": 32},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run that was prepared and played for a round, its learner's identity, and what `check`
    said; the server is gone by now."""
    folder, model = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("model")
    save_tiny_causal_lm(model)
    with (
        completion_server(lambda: load_base(model)) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv(SERVER, server.url)
        run = init_run(write_recipe(folder, model), folder / "run", [])
        report = check_recipe(run.recipe(), pilot=False, target_se={})
        learner = prepared(run)
        play_round(run, run.recipe(), learner)
        return run, learner.identity(), report


def prepared(run: RunDirectory) -> LoraLearner:
    """The run's learner, after `prepare`."""
    recipe = run.recipe()
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, prompts, run.score_cache)
    prepare(run, recipe, learner, left_out)
    return learner


@pytest.fixture(scope="module")
def run(served) -> RunDirectory:
    return served[0]


def test_a_round_by_a_server_has_a_certificate_and_names_its_sampler(served):
    run, identity, _ = served
    record = RoundRecord.read(run.round_file(0))
    assert record.sampler["rows"] >= 64 and record.sampler["retokenized"] == 0
    assert abs(record.sampler["kl"]) < 1e-3
    assert record.certificate_reason is None and record.kl is not None
    assert run.state().hashes["sampler"] == identity["sampler"]
    assert identity["sampler"] == "vllm:base"
    assert abs(record.sampler["eos_z"]) < 4 and record.sampler["rounding"] < 1e-4
    assert record.sampling_cost["responses"] >= 64 and record.sampling_cost["forward_seconds"] > 0
    assert replay(run) == run.state().lambda_


def test_an_inheriting_run_takes_the_servers_log_probabilities_over(run, tmp_path):
    recipe, tighter = run.path.parent / "recipe.yaml", ["objective.constraints.g.margin=0.2"]
    heir = init_run(recipe, tmp_path / "tighter", tighter, run)
    assert {"server_logp", "exact_ids"} <= set(pd.read_parquet(heir.inherited_file("reference")))


def test_a_drifted_server_takes_the_certificate_with_the_reason(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    drifted = RunDirectory(tmp_path / "run")
    samples = pd.read_parquet(drifted.samples_file(0))
    samples.assign(server_logp=samples["server_logp"] + 0.5).to_parquet(drifted.samples_file(0))
    recipe = drifted.recipe()
    lambda_ = recipe.problem.multipliers(drifted.state().lambda_[0])
    record = round_record(RoundTables.read(drifted, 0), recipe, lambda_)
    assert record.lagrangian_gap is None and record.kl is None and record.objective is None
    assert "nats per response from the policy" in record.certificate_reason
    assert record.kl_reason == record.certificate_reason
    assert record.test.u == RoundRecord.read(run.round_file(0)).test.u


def test_check_compares_the_server_with_the_policy(served):
    _, identity, report = served
    assert report.sampler["fingerprint"] == identity["sampler"]
    assert report.sampler["rows"] >= 64 and abs(report.sampler["kl"]) < 1e-3
    assert report.sampler["cost"]["responses"] >= 64 and len(report.sampler["servers"]) == 1
    (slots,) = report.warnings
    assert "--max-loras" in slots and not report.not_checked


def test_check_lists_servers_that_are_not_there(run, monkeypatch):
    monkeypatch.setenv(SERVER, "http://127.0.0.1:9/v1")
    monkeypatch.setattr(data_prep.http, "FIRST_PAUSE", 0.01)
    recipe = run.recipe()
    scorer = HttpScorerSettings(type="http", url="http://127.0.0.1:9/score", version="1")
    reward = recipe.objective.reward.model_copy(update={"scorer": scorer})
    objective = recipe.objective.model_copy(update={"reward": reward})
    unreachable = recipe.model_copy(update={"objective": objective})
    report = check_recipe(unreachable, pilot=True, target_se={})
    assert report.pilot is None and list(report.scorers) == ["g"]
    score, complete = report.not_checked
    assert "http://127.0.0.1:9/score: ConnectError" in score
    assert "http://127.0.0.1:9/v1/models: ConnectError" in complete


def test_a_server_of_another_model_is_refused_in_prepare(run, tmp_path, monkeypatch):
    other = save_tiny_causal_lm(tmp_path / "other", seed=7)
    with completion_server(lambda: load_base(other)) as server:
        monkeypatch.setenv(SERVER, server.url)
        fresh = init_run(run.path.parent / "recipe.yaml", tmp_path / "run", [])
        with pytest.raises(UserError, match=r"^pool: http\S+ has log-probabilities that are"):
            prepared(fresh)
    assert not fresh.state().prepared and not list(tmp_path.glob("run/shards/*/*.parquet"))


@pytest.mark.slow
def test_an_ignored_adapter_is_refused_before_the_multipliers_move(run, tmp_path, monkeypatch):
    shutil.copytree(run.path, tmp_path / "run")
    again, model = RunDirectory(tmp_path / "run"), run.recipe().policy.model
    before = again.state().lambda_
    learner = LoraLearner(again.recipe(), again.prompts(), again.score_cache)
    faults = Faults(ignores_adapters=True)
    with completion_server(lambda: load_base(model), faults) as server:
        monkeypatch.setenv(SERVER, server.url)
        with pytest.raises(UserError, match=r"^round-001: http\S+ answers with the base's"):
            play_round(again, again.recipe(), learner)
    assert again.state().lambda_ == before and not again.round_file(1).exists()


def test_adapters_on_the_head_are_known_by_their_modules(run):
    recipe = run.recipe()
    policy = load_policy(recipe.policy)
    assert adapts_head(policy, ["q_proj", "lm_head"]) and adapts_head(policy, r".*(q_proj|lm_head)")
    for targets in ("all-linear", ["q_proj", "head"], r"model\..*"):
        assert not adapts_head(policy, targets)
    lora = recipe.policy.lora.model_copy(update={"target_modules": ["q_proj", "lm_head"]})
    settings = recipe.policy.model_copy(update={"lora": lora})
    head, _ = server_warnings(recipe.model_copy(update={"policy": settings}), policy)
    assert "target_modules: all-linear" in head
