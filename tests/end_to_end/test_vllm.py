"""A whole conditional run against real vLLM, killed and restarted; its exported adapters served at
once by the line that the model card prints.

The first time, vLLM is installed into a venv of its own (`tests.helpers.vllm`).
"""

import gc
import json
import re
import shlex
import threading
import time

import httpx
import numpy as np
import pytest
import torch
import yaml

from constrained_dpo.run.create import init_run
from constrained_dpo.run.record import read_records, replay
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from tests.helpers.cli import cdpo
from tests.helpers.models import save_word_tokenizer, tiny_llama_config
from tests.helpers.vllm import start_vllm, vllm_python

pytestmark = pytest.mark.slow

SCORERS = """
def f(p, r): return [len(x.split()) for x in r]
def g(p, r): return [x.count('1') for x in r]
"""
SERVED = ("--served-model-name", "base", "--max-model-len", "64")
ADAPTERS = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that vLLM's attention on the CPU takes, prompts and scorers."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm")
    size = save_word_tokenizer(folder / "model", " ".join(f"w{i}" for i in range(60)))
    config = tiny_llama_config(size, head_dim=64)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 128, 2, 2
    config.initializer_range = 0.15
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "scorers.py").write_text(SCORERS)
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    started = start_vllm(
        vllm_python(), folder, "--model", str(folder / "model"), *SERVED, *ADAPTERS
    )
    yield started
    started.kill()


def write_recipe(folder, url: str):
    scorer = lambda name: {"type": "python", "target": f"{folder}/scorers.py:{name}"}
    served = {"base_url": url, "model": "base", "shard_size": 64, "timeout": 600, "retries": 40}
    recipe = {
        "name": "served",
        "policy": {
            "model": str(folder / "model"),
            "quantization": "none",
            "dtype": "float32",
            "lora": {"r": 4},
        },
        "prompts": {"source": str(folder / "prompts.jsonl"), "test": 0.3, "template": "{prompt}"},
        "sampling": {"responses_per_prompt": 8, "max_new_tokens": 8}
        | {"backend": "openai", "server": served},
        "objective": {
            "beta": 1.0,
            "reward": {"name": "f", "scorer": scorer("f")},
            "constraints": [{"name": "g", "margin": 0.1, "scorer": scorer("g")}],
        },
        "dual": {
            "prompts_per_round": 8,
            "responses_per_prompt": 8,
            "rounds": 1,
            "method": "solve",
            "trials": 2,
            "confidence_side": "none",
        },
        "fit": {"steps": 6, "batch_size": 8, "max_length": 32, "refresh": 1, "conditional": {}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def run(folder, server):
    """A run during whose first round the server is killed and started again."""
    run = init_run(write_recipe(folder, f"{server.url}/v1"), folder / "run", [])

    def kill_once():
        while not list(run.path.glob("rounds/000/**/.adapter-*")):
            time.sleep(0.02)
        server.kill()
        time.sleep(1.0)
        server.start(wait=False)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    result = cdpo("run", run.path, check=0)
    killer.join(timeout=60)
    assert not killer.is_alive(), "the server was never killed"
    return run, result.stderr


def test_a_conditional_run_is_played_through_a_kill_of_its_server(run, server):
    run, stderr = run
    (record,) = read_records(run)
    assert replay(run) == run.state().lambda_ and record.trials
    assert record.certificate_reason is None or "server" not in record.certificate_reason
    assert record.sampler["rounding"] < 1e-4 and abs(record.sampler["eos_z"]) < 4
    assert record.sampling_cost["server_seconds"] > 0
    assert re.search(r"tried again up to \d+ times", stderr) and "answers again" in stderr
    gc.collect()  # the command ran in this process
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["base"]


def greedy(url: str, model: str, prompts: list[list[int]]) -> list[list[int]]:
    body = {"model": model, "prompt": prompts, "max_tokens": 8, "temperature": 0.0}
    more = {"return_token_ids": True, "stop_token_ids": [2]}
    answer = httpx.post(f"{url}/v1/completions", json=body | more, timeout=600).json()
    return [choice["token_ids"] for choice in answer["choices"]]


def test_exported_adapters_are_served_at_once_and_answer_as_with_peft(run, folder):
    """By the line of the model card; the base beside them, and greedy texts equal PEFT's."""
    run, _ = run
    out = folder / "exported"
    cdpo("export", run.path, out, "--margin", "g=0.05,0.15", check=0)
    line = re.search(r"^vllm serve .*$", (out / "README.md").read_text(), re.M).group(0)
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"] and words[3:6] == ["--enable-lora", "--max-loras", "3"]
    policy = load_policy(run.recipe().policy)
    prompts = [policy.tokenizer(f"w{i} w{i + 1}")["input_ids"] for i in range(12)]
    server = start_vllm(vllm_python(), folder, "--model", *words[2:], "--max-model-len", "64")
    try:
        names = dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
        assert len(names) == 2
        for name, adapter in [*names.items(), (words[2], None)]:
            with attached_adapter(policy, adapter) as model, torch.no_grad():
                expected = []
                for prompt in prompts:
                    ids = list(prompt)
                    while len(ids) < len(prompt) + 8 and ids[-1] != 2:
                        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                    expected.append(ids[len(prompt) :])
            np.testing.assert_equal(greedy(server.url, name, prompts), expected)
    finally:
        server.kill()
