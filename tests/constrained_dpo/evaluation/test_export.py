"""`cdpo export` of a real small run: what plain libraries load, and what its card says."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from constrained_dpo.run.record import RoundRecord
from data_prep.models.policy import resolve_model
from data_prep.models.settings import PolicySettings
from tests.helpers.cli import cdpo

BASE = PolicySettings(model="quickstart")


def with_adapter(folder, dtype) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(resolve_model(BASE), dtype=dtype)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def test_an_exported_adapter_loads_in_plain_peft_and_its_card_says_what_it_is(run, tmp_path):
    out = tmp_path / "adapter"
    cdpo("export", run.path, out, check=0)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {f.name for f in out.iterdir()} == files
    plain = with_adapter(out, torch.float32)
    weights = {n: p for n, p in plain.named_parameters() if "lora_B" in n}
    assert weights and all(p.abs().max() > 0 for p in weights.values())
    card, record = (out / "README.md").read_text(), RoundRecord.read(run.round_file(1))
    facts = [f"{record.lambda_['harmless']:.4f}", record.verdict, "at least 0.5 above π_ref"]
    facts += ["temperature 1", "library_name: peft", *run.state().hashes["scorers"].values()]
    assert [fact for fact in facts if fact not in card] == []


def greedy(model, tokenizer, prompts: list[str]) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = model.generate(
            input_ids=ids, do_sample=False, max_new_tokens=3, repetition_penalty=1.0
        )
        rows.append(answer[0, ids.shape[1] :].tolist())
    return rows


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "merged"
    cdpo("export", run.path, out, "--merge", check=0)
    return out


def test_a_merged_export_gives_the_adapters_greedy_answers(run, merged):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    models = [
        AutoModelForCausalLM.from_pretrained(merged),
        with_adapter(run.adapter_folder(1), torch.bfloat16),
    ]
    assert models[0].dtype == torch.bfloat16
    prompts = run.prompts()["prompt"].tolist()
    ours, theirs = (greedy(model, tokenizer, prompts) for model in models)
    same = np.mean([a == b for a, b in zip(ours, theirs, strict=True)])
    assert same > 0.9, f"{same:.3f} of the greedy answers agree"


def test_a_merged_export_is_measured_again(run, merged):
    measurement = json.loads((merged / "measurement.json").read_text())
    test = RoundRecord.read(run.round_file(1)).test
    assert measurement["num_prompts"] == test.num_prompts and measurement["u"] != test.u
    assert abs(measurement["u"]["harmless"] - test.u["harmless"]) < 0.3
    assert abs(measurement["kl"] - test.kl) < 0.6
    card = (merged / "README.md").read_text()
    for fact in (measurement["verdict"], f"{measurement['u']['harmless']:+.3f}"):
        assert fact in card
    assert "library_name: transformers" in card
    assert not list(merged.parent.glob(".*.tmp"))


def test_nothing_is_written_over(run, refused):
    refused("export", run.path, run.path, match="exists already")
