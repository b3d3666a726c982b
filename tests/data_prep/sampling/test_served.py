"""Sampling from completions servers: what is kept of an answer, its law beside the policy's,
faults, adapters.

`transformers serve` itself is asked in test_transformers_serve.py.
"""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import data_prep.http
from constrained_dpo.estimates.sampling_law import (
    NOT_THE_POLICY,
    compare_sampler,
    why_not_the_policy,
)
from data_prep.errors import UserError
from data_prep.sampling.completions import CompletionServers, prompt_text
from data_prep.sampling.law import SamplingSettings, law_hash
from data_prep.sampling.served import read_choice
from data_prep.tables import SERVED
from tests.helpers.completion_server import Faults, completion_server
from tests.helpers.models import tiny_adapter
from tests.helpers.served import draw, load_base, prompts_of, served_by
from tests.helpers.servers import start_fault_server


def test_token_ids_and_log_probabilities_of_the_server_are_kept_and_agree(policy, model_folder):
    with completion_server(lambda: load_base(model_folder)) as server:
        settings = served_by(server.url)
        table = draw(policy, settings, 2, 16)
        again = draw(policy, settings, 2, 16)
        other = draw(policy, settings, 2, 16, seed=4)
    prompts = table["prompt_id"]
    assert prompts.tolist() == [pid for pid in prompts.unique() for _ in range(16)]
    assert table["response_id"].is_unique and table["exact_ids"].all()
    np.testing.assert_allclose(table["server_logp"], table["policy_logp"], atol=1e-4)
    assert table["ended"].tolist() == [ids[-1] == 2 for ids in table["token_ids"]]
    assert table["ended"].nunique() == 2
    words = [[f"w{i - 4}" for i in ids if i > 3] for ids in table["token_ids"]]
    assert [text.split() for text in table["response"]] == words
    assert again["response"].equals(table["response"])
    assert not other["response"].equals(table["response"])
    assert (table.groupby("prompt_id")["response"].nunique() > 1).all()
    sent = server.requests[0][1]
    assert (sent["n"], sent["top_k"], sent["repetition_penalty"]) == (16, 0, 1.0)
    assert sent["stop_token_ids"] == [2]
    assert why_not_the_policy(settings, table) is None
    assert abs(compare_sampler(table)["kl"]) < 1e-4


def test_a_server_of_texts_draws_from_the_policy_through_every_fault(
    policy, model_folder, monkeypatch, tmp_path
):
    """Text in and out, one response per request. Each is drawn once, and none is another's."""
    monkeypatch.setattr(data_prep.http, "FIRST_PAUSE", 0.01)
    text = {"kind": "transformers", "adapter_model": "{path}"}
    faults = ["500", "ok", "429", "ok", "garbled", "ok", "list", "drop", "ok", "503"]
    with completion_server(lambda: load_base(model_folder), tokenizer=policy.tokenizer) as server:
        settings = served_by(server.url, **text)
        plain = draw(policy, settings, 2, 8)
        proxy = start_fault_server(tmp_path, faults, server.url.removesuffix("/v1"))
        try:
            faulty = draw(policy, served_by(f"{proxy.url}/v1", **text), 2, 8)
        finally:
            proxy.kill()
    assert faulty["response"].equals(plain["response"])
    assert faulty["policy_logp"].equals(plain["policy_logp"])
    answered = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text().splitlines()]
    assert [line["status"] for line in answered] == [200] * 16
    assert (plain.groupby("prompt_id")["response"].nunique() > 1).all()
    # Lengths tell whether the tokenization is the one that was drawn; special tokens that were
    # drawn leave no text.
    assert plain["exact_ids"].sum() > 8 and (plain["token_ids"].map(len) <= 6).all()
    assert plain["server_logp"].isna().all()
    assert "gave log-probabilities of 0 of 16" in why_not_the_policy(settings, plain)


def test_another_law_is_measured_and_takes_the_certificate(policy, model_folder):
    """KL(q‖π) of a server with sharper logits, against the exact one over first tokens."""
    with completion_server(lambda: load_base(model_folder), Faults(sharpen=3.0)) as server:
        settings = served_by(server.url, tolerance=0.02).model_copy(update={"max_new_tokens": 1})
        table = draw(policy, settings, 2, 100)
    exact = []
    for tokens in prompts_of(policy, 2)[1].values():
        with torch.no_grad():
            logits = policy.model(torch.tensor([tokens])).logits[0, -1].double()
        q, p = (3 * logits).log_softmax(-1), logits.log_softmax(-1)
        exact.append(float((q.exp() * (q - p)).sum()))
    law = compare_sampler(table)
    spread = (table["server_logp"] - table["policy_logp"]).std() / np.sqrt(200)
    assert law["rows"] == 200 and abs(law["kl"] - np.mean(exact)) < 4 * spread
    assert "nats per response from the policy" in why_not_the_policy(settings, table)
    assert why_not_the_policy(served_by(server.url, tolerance=50.0), table) is None
    silent = table.assign(server_logp=np.nan)
    assert "gave log-probabilities of 0 of 200" in why_not_the_policy(settings, silent)
    cold = settings.model_copy(update={"temperature": 0.5})
    assert why_not_the_policy(cold, table) == NOT_THE_POLICY
    local = table.drop(columns=[name for name in SERVED if name in table])
    assert why_not_the_policy(SamplingSettings(), local) is None


def test_a_rounds_adapter_is_loaded_once_and_is_what_samples(policy, model_folder, tmp_path):
    adapter = tiny_adapter(policy, tmp_path / "adapter")
    with completion_server(lambda: load_base(model_folder)) as server:
        settings = served_by(server.url)
        table = draw(policy, settings, 2, 8, adapter=adapter)
    loads = [body for path, body in server.requests if path == "/v1/load_lora_adapter"]
    assert len(loads) == 1 and loads[0]["lora_path"] == str(adapter.resolve())
    np.testing.assert_allclose(table["server_logp"], table["policy_logp"], atol=1e-4)
    assert (table["policy_logp"] - table["ref_logp"]).abs().max() > 0.05
    pattern = served_by("http://localhost:1/v1", kind="openai", adapter_model="my/{name}").server
    own = loads[0]["lora_name"].rsplit("-", 1)[1]
    model = CompletionServers(pattern).adapters.model(adapter)
    assert model.startswith("my/cdpo-") and model.endswith(own)


def test_settings_that_cannot_work_are_refused():
    for kind in ("transformers", "openai"):
        with pytest.raises(ValidationError, match="adapter_model"):
            served_by("http://localhost:1/v1", kind=kind)
    with pytest.raises(ValidationError, match=r"needs \{path\} or \{name\}"):
        served_by("http://localhost:1/v1", adapter_model="fixed")
    with pytest.raises(ValidationError, match="is what backend: openai needs"):
        SamplingSettings(backend="openai")


def test_a_servers_law_is_another_than_ours():
    served = served_by("http://a/v1").model_copy(update={"max_new_tokens": 256})
    assert law_hash(SamplingSettings(), (2,)) != law_hash(served, (2,))


def test_text_that_must_be_tokenized_again_is_counted(policy):
    def ids_of(text, finish_reason, **count):
        return read_choice(policy, {"text": text, "finish_reason": finish_reason, **count}).ids

    stopped = {"text": "w1 w2", "finish_reason": "stop", "completion_tokens": 3}
    drawn = read_choice(policy, stopped)
    assert (drawn.ids, drawn.text, drawn.exact) == ([5, 6, 2], "w1 w2", True)
    assert np.isnan(drawn.server_logp) and not drawn.told
    assert ids_of("w1 w2", "length", completion_tokens=2) == [5, 6]
    # The EOS was the last allowed token.
    assert ids_of("w1 w2", "length", completion_tokens=3) == [5, 6, 2]
    assert ids_of("", "length") == [2]
    longer = stopped | {"finish_reason": "length", "completion_tokens": 6}
    assert read_choice(policy, longer).exact is False
    with pytest.raises(UserError, match="a prompt's tokens are not those of any text"):
        prompt_text(policy, [5, 6])  # the tokenizer would put <s> in front


def test_an_eos_that_the_server_leaves_out_has_no_log_probability(policy):
    choice = {
        "text": "?",
        "token_ids": [5, 6],
        "finish_reason": "stop",
        "matched_stop": 2,
        "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }
    drawn = read_choice(policy, choice)
    assert (drawn.ids, drawn.exact) == ([5, 6, 2], True) and np.isnan(drawn.server_logp)


def test_a_token_that_the_policy_does_not_embed_is_a_word_about_the_server(policy):
    choice = {"text": "?", "token_ids": [5, 64, 2], "finish_reason": "stop"}
    with pytest.raises(UserError, match=r"drew token 64, and the policy embeds 64: it serves anot"):
        read_choice(policy, choice)
