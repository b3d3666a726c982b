"""Sampling from `transformers serve` as it is; its quick stand-in is in test_served.py."""

import importlib.util
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from constrained_dpo.estimates.sampling_law import why_not_the_policy
from constrained_dpo.learners.collect import Collection, collect
from data_prep.errors import UserError
from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings
from data_prep.sampling.served import ServedSampler
from tests.helpers.served import draw, prompts_of, served_by
from tests.helpers.servers import start_fault_server, start_transformers_serve

SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVING, reason="transformers serve needs fastapi, uvicorn and openai"),
]


def settings_for(url: str, model_folder, **more) -> SamplingSettings:
    return served_by(
        f"{url}/v1", kind="transformers", model=str(model_folder), adapter_model="{path}", **more
    )


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    server = start_transformers_serve(model_folder, tmp_path_factory.mktemp("transformers"))
    yield server
    server.kill()


def statuses(folder) -> list[int]:
    """Of the requests that a fault server passed on and answered."""
    file = folder / "answered.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["status"] for line in lines]


def test_transformers_serve_draws_from_the_policy_through_every_fault(
    policy, model_folder, server, tmp_path
):
    settings = settings_for(server.url, model_folder)
    plain = draw(policy, settings, 2, 8)
    faults = ["500", "ok", "429", "ok", "garbled", "ok", "drop", "ok", "slow", "ok", "503"]
    proxy = start_fault_server(tmp_path, faults, server.url)
    try:
        faulty = draw(policy, settings_for(proxy.url, model_folder, timeout=1.0), 2, 8)
        with pytest.raises(UserError, match=r"HTTP 400: Server is pinned to"):
            draw(policy, settings_for(proxy.url, "another"), 1, 1)
    finally:
        proxy.kill()
    assert faulty["response"].equals(plain["response"])
    assert faulty["policy_logp"].equals(plain["policy_logp"])
    assert statuses(tmp_path).count(200) == 16
    assert len(plain) == 16 and (plain.groupby("prompt_id")["response"].nunique() > 1).all()
    assert plain["server_logp"].isna().all()
    assert "gave log-probabilities of 0 of 16" in why_not_the_policy(settings, plain)
    # Lengths tell whether the tokenization is the one that was drawn; special tokens that were
    # drawn leave no text.
    assert plain["exact_ids"].sum() > 8 and (plain["token_ids"].map(len) <= 6).all()
    # The same law as ours: surprise under the policy beside that of samples drawn here.
    table, tokens = prompts_of(policy, 2)
    local = Sampler(policy, tokens, SamplingSettings(max_new_tokens=6)).draw(
        table, responses_per_prompt=8, adapter=None, source="reference", seed=1
    )
    spread = np.hypot(plain["policy_logp"].std(), local["policy_logp"].std()) / np.sqrt(16)
    assert abs(plain["policy_logp"].mean() - local["policy_logp"].mean()) < 5 * spread


def test_transformers_serve_killed_midway_and_restarted_loses_nothing(
    policy, model_folder, server, tmp_path
):
    """Through `collect`: the shard under way waits for the restart; the answers are those of a
    server that never died."""
    table, tokens = prompts_of(policy, 12)

    class Learner:
        """Draws on a server, scores by length."""

        def __init__(self, url):
            settings = settings_for(url, model_folder, retries=30, timeout=10.0)
            local = Sampler(policy, tokens, settings)
            self.sample = ServedSampler(CompletionServers(settings.server), local).draw

        def score(self, responses):
            return responses.assign(f=responses["response"].map(len).astype(float))

    job = Collection(
        phase="pool",
        folder=tmp_path / "whole",
        source="reference-pool",
        responses_per_prompt=4,
        shard_size=8,
        objectives=["f"],
        seed=1,
        rule=None,
    )
    whole = collect(Learner(server.url), table, job)
    killed = start_transformers_serve(model_folder, tmp_path)
    proxy = start_fault_server(tmp_path, [], killed.url)  # counts what was answered

    def kill_and_restart():
        while len(statuses(tmp_path)) < 19:
            time.sleep(0.005)
        killed.kill()
        time.sleep(1.0)
        killed.start(wait=False)

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    try:
        result = collect(Learner(proxy.url), table, replace(job, folder=tmp_path / "killed"))
    finally:
        thread.join()
        proxy.kill()
        killed.kill()
    same = whole.columns.drop(["token_ids", "server_url"])
    assert result[same].equals(whole[same])
    codes = statuses(tmp_path)
    assert codes.count(200) == 48, "a response was drawn twice"
    assert codes.count(502) >= 1, "the server was never away"
