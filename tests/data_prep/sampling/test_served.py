"""Sampling from completions servers: `transformers serve` as it is, and vLLM's fields; faults,
kills, adapters, the law compared."""

import importlib.util
import json
import threading
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import ValidationError

import data_prep.http
from constrained_dpo.check.check import check_recipe
from constrained_dpo.estimates.sampling_law import (
    NOT_THE_POLICY,
    compare_sampler,
    why_not_the_policy,
)
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.record import replay
from constrained_dpo.run.rounds import play_round
from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.prompts.split import split_prompts
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings, law_hash
from data_prep.sampling.served import CompletionServer, ServedSampler, prompt_text, read_choice
from data_prep.scorers.settings import HttpScorerSettings
from tests.helpers.completion_server import completion_server
from tests.helpers.models import save_tiny_causal_lm, tiny_adapter
from tests.helpers.servers import start_fault_server, start_transformers_serve

SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai"))
needs_serving = pytest.mark.skipif(
    not SERVING, reason="transformers serve needs fastapi, uvicorn and openai"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def policy(model_folder):
    return load_policy(
        PolicySettings(model=str(model_folder), quantization="none", dtype="float32")
    )


def prompts_of(policy, count: int) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    texts = [f"w{i} w{2 * i} w{3 * i}" for i in range(count)]
    return pd.DataFrame({"prompt_id": texts, "prompt": texts}), {
        t: policy.tokenizer(t)["input_ids"] for t in texts
    }


def served_by(url: str, **more) -> SamplingSettings:
    server = {"base_url": url, "model": "base", "timeout": 20.0} | more
    return SamplingSettings(backend="openai", max_new_tokens=6, batch_size=64, server=server)


def load_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def draw(policy, settings, count, per_prompt, adapter=None, seed=3) -> pd.DataFrame:
    table, tokens = prompts_of(policy, count)
    sampler = ServedSampler(CompletionServer(settings.server), Sampler(policy, tokens, settings))
    return sampler.draw(
        table, responses_per_prompt=per_prompt, adapter=adapter, source="reference", seed=seed
    )


def test_token_ids_and_log_probabilities_of_the_server_are_kept_and_agree(policy, model_folder):
    with completion_server(lambda: load_base(model_folder)) as server:
        settings = served_by(server.url)
        table = draw(policy, settings, 2, 16)
        again = draw(policy, settings, 2, 16)
        other = draw(policy, settings, 2, 16, seed=4)
    assert table["prompt_id"].tolist() == [
        pid for pid in table["prompt_id"].unique() for _ in range(16)
    ]
    assert table["response_id"].is_unique and table["exact_ids"].all()
    np.testing.assert_allclose(table["server_logp"], table["policy_logp"], atol=1e-4)
    assert (
        table["ended"].tolist() == [ids[-1] == 2 for ids in table["token_ids"]]
        and table["ended"].any()
        and not table["ended"].all()
    )
    assert [t.split() for t in table["response"]] == [
        [f"w{i - 4}" for i in ids if i > 3] for ids in table["token_ids"]
    ]
    assert again["response"].equals(table["response"]) and not other["response"].equals(
        table["response"]
    )
    assert (table.groupby("prompt_id")["response"].nunique() > 1).all()
    sent = server.requests[0][1]
    assert (sent["n"], sent["top_k"], sent["repetition_penalty"], sent["stop_token_ids"]) == (
        16,
        0,
        1.0,
        [2],
    )
    assert why_not_the_policy(settings, table) is None and abs(compare_sampler(table)["kl"]) < 1e-4


def test_another_law_is_measured_and_takes_the_certificate(policy, model_folder):
    """KL(q‖π) of a server with sharper logits, against the exact one over first tokens."""
    with completion_server(lambda: load_base(model_folder), sharpen=3.0) as server:
        settings = served_by(server.url, tolerance=0.02).model_copy(update={"max_new_tokens": 1})
        table = draw(policy, settings, 2, 200)
    import torch

    exact = []
    for tokens in prompts_of(policy, 2)[1].values():
        with torch.no_grad():
            logits = policy.model(torch.tensor([tokens])).logits[0, -1].double()
        q, p = (3 * logits).log_softmax(-1), logits.log_softmax(-1)
        exact.append(float((q.exp() * (q - p)).sum()))
    found = compare_sampler(table)
    spread = (table["server_logp"] - table["policy_logp"]).std() / np.sqrt(400)
    assert found["rows"] == 400 and abs(found["kl"] - np.mean(exact)) < 4 * spread
    assert "nats per response from the policy" in why_not_the_policy(settings, table)
    assert why_not_the_policy(served_by(server.url, tolerance=50.0), table) is None
    assert "gave log-probabilities of 0 of 400" in why_not_the_policy(
        settings, table.assign(server_logp=np.nan)
    )
    assert (
        why_not_the_policy(settings.model_copy(update={"temperature": 0.5}), table)
        == NOT_THE_POLICY
    )
    assert (
        why_not_the_policy(SamplingSettings(), table.drop(columns=["server_logp", "exact_ids"]))
        is None
    )


def test_a_rounds_adapter_is_loaded_once_and_is_what_samples(policy, model_folder, tmp_path):
    adapter = tiny_adapter(policy, tmp_path / "adapter")
    with completion_server(lambda: load_base(model_folder)) as server:
        settings = served_by(server.url)
        table = draw(policy, settings, 2, 8, adapter=adapter)
        assert draw(policy, settings, 2, 8, adapter=adapter)["response"].equals(
            table["response"]
        )  # another client, the same server
    loads = [body for path, body in server.requests if path == "/v1/load_lora_adapter"]
    assert len(loads) == 1 and loads[0]["lora_path"] == str(adapter.resolve())
    np.testing.assert_allclose(table["server_logp"], table["policy_logp"], atol=1e-4)
    assert (table["policy_logp"] - table["ref_logp"]).abs().max() > 0.05
    pattern = served_by("http://localhost:1/v1", kind="openai", adapter_model="mine/{name}").server
    assert CompletionServer(pattern).model_name(adapter) == f"mine/{loads[0]['lora_name']}"


def test_settings_that_cannot_work_are_refused():
    for kind in ("transformers", "openai"):
        with pytest.raises(ValidationError, match="adapter_model"):
            served_by("http://localhost:1/v1", kind=kind)
    with pytest.raises(ValidationError, match=r"needs \{path\} or \{name\}"):
        served_by("http://localhost:1/v1", adapter_model="fixed")
    with pytest.raises(ValidationError, match="is what backend: openai needs"):
        SamplingSettings(backend="openai")
    assert law_hash(SamplingSettings(), (2,)) != law_hash(
        served_by("http://a/v1").model_copy(update={"max_new_tokens": 256}), (2,)
    )


def test_text_that_must_be_tokenized_again_is_counted(policy):
    read = lambda **choice: read_choice(policy, choice)
    assert read(text="w1 w2", finish_reason="stop", completion_tokens=3) == (
        [5, 6, 2],
        "w1 w2",
        pytest.approx(np.nan, nan_ok=True),
        True,
    )
    assert read(text="w1 w2", finish_reason="length", completion_tokens=2)[0] == [5, 6]
    assert read(text="w1 w2", finish_reason="length", completion_tokens=3)[0] == [
        5,
        6,
        2,
    ]  # the EOS was the last allowed token
    assert read(text="w1 w2", finish_reason="length", completion_tokens=6)[3] is False
    assert read(text="", finish_reason="length")[0] == [2]
    ids, _, logp, exact = read(
        text="?",
        token_ids=[5, 6],
        finish_reason="stop",
        matched_stop=2,
        logprobs={"token_logprobs": [-1.0, -2.0]},
    )
    assert (ids, exact) == ([5, 6, 2], True) and np.isnan(
        logp
    )  # of the EOS there is no log-probability
    with pytest.raises(UserError, match="a prompt's tokens are not those of any text"):
        prompt_text(policy, [5, 6])  # the tokenizer would put <s> in front


@pytest.fixture(scope="module")
def served_run(model_folder, tmp_path_factory):
    """A recipe whose responses come from a server with vLLM's fields, prepared and played for a
    round."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "scorers.py").write_text(
        "def f(p, r): return [len(x.split()) for x in r]\ndef g(p, r): return [x.count('1') for x "
        "in r]\n"
    )
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(10))
    )
    with completion_server(lambda: load_base(model_folder)) as server:
        recipe = {
            "name": "served",
            "policy": {"model": str(model_folder), "quantization": "none", "dtype": "float32"},
            "prompts": {
                "source": str(folder / "prompts.jsonl"),
                "test": 0.4,
                "template": "{prompt}",
            },
            "sampling": {
                "responses_per_prompt": 4,
                "max_new_tokens": 6,
                "batch_size": 32,
                "backend": "openai",
                "server": {"base_url": server.url, "model": "base", "shard_size": 32},
            },
            "objective": {
                "beta": 5.0,
                "reward": {
                    "name": "f",
                    "scorer": {"type": "python", "target": f"{folder}/scorers.py:f"},
                },
                "constraints": [
                    {
                        "name": "g",
                        "margin": 0.1,
                        "scorer": {"type": "python", "target": f"{folder}/scorers.py:g"},
                    }
                ],
            },
            "dual": {"prompts_per_round": 4, "responses_per_prompt": 8},
            "fit": {"steps": 2, "batch_size": 4, "max_length": 32},
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run = init_run(folder / "recipe.yaml", folder / "run", [])
        frozen = run.recipe()
        prompts, left_out = split_prompts(frozen.prompts, frozen.dual.prompts_per_round)
        learner = LoraLearner(frozen, run, prompts)
        checked = check_recipe(frozen, pilot=False, target_se={})
        resolved = prepare(run, frozen, learner, left_out)
        play_round(run, resolved, learner)
        identity = learner.identity()
    return run, identity, checked


def test_a_round_by_a_server_has_a_certificate_and_names_its_sampler(served_run, tmp_path):
    run, identity, _ = served_run
    record = run.round_record(0)
    assert (
        record["sampler"]["rows"] >= 64
        and abs(record["sampler"]["kl"]) < 1e-3
        and record["sampler"]["retokenized"] == 0
    )
    assert record["certificate_reason"] is None and record["kl"] is not None
    assert run.state()["hashes"]["sampler"] == identity["sampler"] and identity[
        "sampler"
    ].startswith("vllm:")
    assert replay(run) == run.state()["lambda"]
    tighter = init_run(
        run.path.parent / "recipe.yaml",
        tmp_path / "tighter",
        ["objective.constraints.g.margin=0.2"],
        run,
    )
    assert {"server_logp", "exact_ids"} <= set(pd.read_parquet(tighter.inherited_file("reference")))


def test_a_drifted_server_takes_the_certificate_with_the_reason(served_run, tmp_path):
    import shutil

    from constrained_dpo.run.record import round_record

    run, _, _ = served_run
    shutil.copytree(run.path, tmp_path / "run")
    copy = RunDirectory(tmp_path / "run")
    samples = pd.read_parquet(copy.samples_file(0))
    samples.assign(server_logp=samples["server_logp"] + 0.5).to_parquet(copy.samples_file(0))
    recipe = copy.recipe()
    record = round_record(copy, recipe, recipe.problem.multipliers(copy.state()["lambda"][0]), [])
    assert record["lagrangian_gap"] is None and record["kl"] is None and record["objective"] is None
    assert (
        "nats per response from the policy" in record["certificate_reason"]
        and record["kl_reason"] == record["certificate_reason"]
    )
    assert record["u"] == run.round_record(0)["u"]


def test_check_compares_the_server_and_lists_one_that_is_not_there(served_run, monkeypatch):
    run, identity, checked = served_run
    assert (
        checked["sampler"]["fingerprint"] == identity["sampler"]
        and checked["sampler"]["rows"] >= 64
        and not checked["warnings"]
    )
    assert abs(checked["sampler"]["kl"]) < 1e-3 and not checked["not_checked"]
    monkeypatch.setattr(data_prep.http, "FIRST_PAUSE", 0.01)
    recipe = run.recipe()  # whose server was closed since
    scorer = HttpScorerSettings(type="http", url="http://127.0.0.1:9/score", version="1")
    objective = recipe.objective.model_copy(
        update={"reward": recipe.objective.reward.model_copy(update={"scorer": scorer})}
    )
    without = check_recipe(
        recipe.model_copy(update={"objective": objective}), pilot=True, target_se={}
    )
    assert (
        len(without["not_checked"]) == 2
        and "pilot" not in without
        and list(without["scorers"]) == ["g"]
    )
    assert "http://127.0.0.1:9/score: ConnectError" in without["not_checked"][0]
    assert (
        f"{recipe.sampling.server.base_url}/completions: ConnectError" in without["not_checked"][1]
    )


def transformers_settings(url: str, model_folder, **more) -> SamplingSettings:
    return served_by(
        f"{url}/v1", kind="transformers", model=str(model_folder), adapter_model="{path}", **more
    )


@pytest.fixture(scope="module")
def transformers_server(model_folder, tmp_path_factory):
    server = start_transformers_serve(model_folder, tmp_path_factory.mktemp("transformers"))
    yield server
    server.kill()


@needs_serving
def test_transformers_serve_draws_from_the_policy_through_every_fault(
    policy, model_folder, transformers_server, tmp_path
):
    settings = transformers_settings(transformers_server.url, model_folder)
    plain = draw(policy, settings, 2, 8)
    proxy = start_fault_server(
        tmp_path,
        ["500", "ok", "429", "ok", "garbled", "ok", "drop", "ok", "slow", "ok", "503"],
        transformers_server.url,
    )
    try:
        faulty = draw(policy, transformers_settings(proxy.url, model_folder, timeout=1.0), 2, 8)
        with pytest.raises(UserError, match=r"HTTP 400: Server is pinned to"):
            draw(policy, transformers_settings(proxy.url, "another"), 1, 1)
    finally:
        proxy.kill()
    assert faulty["response"].equals(plain["response"]) and faulty["policy_logp"].equals(
        plain["policy_logp"]
    )
    answered = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text().splitlines()]
    assert sum(line["status"] == 200 for line in answered) == 16
    assert len(plain) == 16 and (plain.groupby("prompt_id")["response"].nunique() > 1).all()
    assert plain[
        "server_logp"
    ].isna().all() and "gave log-probabilities of 0 of 16" in why_not_the_policy(settings, plain)
    # Lengths tell whether the tokenization is the one that was drawn; special tokens that were
    # drawn leave no text.
    exact = plain[plain["exact_ids"]]
    assert len(exact) > 8 and (plain["token_ids"].map(len) <= 6).all()
    # The same law as ours: surprise under the policy beside that of our own samples, first
    # tokens of one prompt.
    table, tokens = prompts_of(policy, 2)
    own = Sampler(policy, tokens, SamplingSettings(max_new_tokens=6)).draw(
        table, responses_per_prompt=8, adapter=None, source="reference", seed=1
    )
    spread = np.hypot(plain["policy_logp"].std(), own["policy_logp"].std()) / np.sqrt(16)
    assert abs(plain["policy_logp"].mean() - own["policy_logp"].mean()) < 5 * spread


@needs_serving
@pytest.mark.slow
def test_transformers_serve_killed_midway_and_restarted_loses_nothing(
    policy, model_folder, transformers_server, tmp_path
):
    """Through `collect`: the shard under way waits for the restart; the answers are those of a
    server that never died."""
    table, tokens = prompts_of(policy, 12)

    class Learner:
        prompts = table

        def __init__(self, url):
            self.settings = transformers_settings(url, model_folder, retries=30, timeout=10.0)
            self.server = CompletionServer(self.settings.server)

        def sample(self, prompts, **arguments):
            local = Sampler(policy, tokens, self.settings)
            return ServedSampler(self.server, local).draw(prompts, **arguments)

        def score(self, responses):
            return responses.assign(f=responses["response"].map(len).astype(float))

    def collected(folder, url):
        run = RunDirectory(folder)
        return collect(
            run,
            Learner(url),
            table,
            phase="pool",
            round_number=0,
            responses_per_prompt=4,
            adapter=None,
            source="reference-pool",
            shard_size=8,
            objectives=["f"],
            seed=1,
        )

    whole = collected(tmp_path / "whole", transformers_server.url)
    killed = start_transformers_serve(model_folder, tmp_path)
    proxy = start_fault_server(tmp_path, [], killed.url)  # counts what was answered

    def kill_and_restart():
        while (
            not (tmp_path / "answered.jsonl").exists()
            or len((tmp_path / "answered.jsonl").read_text().splitlines()) < 19
        ):
            time.sleep(0.005)
        killed.kill()
        time.sleep(1.0)
        killed.start(wait=False)

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    try:
        result = collected(tmp_path / "killed", proxy.url)
    finally:
        thread.join()
        proxy.kill()
        killed.kill()
    assert result.drop(columns="token_ids").equals(whole.drop(columns="token_ids"))
    statuses = [
        json.loads(line)["status"]
        for line in (tmp_path / "answered.jsonl").read_text().splitlines()
    ]
    assert statuses.count(200) == 48 and statuses.count(502) >= 1, (
        "each response was drawn once, and the server was away in between"
    )
