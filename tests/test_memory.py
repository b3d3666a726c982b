"""The memory estimate of `cdpo check` against the measured peak of a real fit, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

TOLERANCE = 1.25  # measured: shared rows 1.06 (none), 1.09 (nf4 with checkpointing) times the peak, padded ones 1.02, 1.08
# Every block is mapped and unmapped on its own, so that resident memory is live memory; by default glibc keeps much of what was freed.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
WITH_HEAD = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head]"

FIT = """
import gc, json, os, sys, threading, time
from pathlib import Path
import numpy as np, pandas as pd, psutil, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from constrained_dpo.fit import fit_adapter
from constrained_dpo.memory import estimate_memory
from constrained_dpo.recipe import load_recipe
from data_prep.policy import load_policy
from data_prep.sampling import response_logps

folder, recipe_file, quantization, checkpointing, shared, targets = Path(sys.argv[1]), *sys.argv[2:]
words = 8192
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=words, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, eos_token_id=0,
    pad_token_id=0, bos_token_id=None, max_position_embeddings=512, tie_word_embeddings=False, dtype="float32",
)
LlamaForCausalLM(config).save_pretrained(folder / "model")
table = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=table, pad_token="w0", eos_token="w0").save_pretrained(folder / "model")
recipe = load_recipe(Path(recipe_file), [
    f"policy={{model: {folder / 'model'}, quantization: {quantization}, dtype: float32, lora: {{target_modules: {targets}}}}}",
    f"fit={{steps: 1, batch_size: 8, max_length: 128, shared_prompts: {shared}, gradient_checkpointing: {checkpointing}}}",
    "sampling={max_new_tokens: 64, batch_size: 8}",
])
prompt_length, rows = 64, 8
rng = np.random.default_rng(0)
def tokens(n): return rng.integers(1, words, n).astype(np.int32)

def fit(length, policy, name):
    prompt = tokens(prompt_length).tolist()
    names = [f"y{i}" for i in range(2 * rows)]
    pool = pd.DataFrame({"prompt_id": "p", "response_id": names, "token_ids": [tokens(length) for _ in names]})
    answers, pool["sample_logp"] = [ids.tolist() for ids in pool["token_ids"]], np.nan
    pool["ref_logp"], _ = response_logps(policy.model, [prompt] * len(pool), answers, pad_id=0, batch_size=4)
    ids = pool["response_id"].to_numpy()
    pairs = pd.DataFrame({"prompt_id": "p", "chosen_id": ids[:rows], "rejected_id": ids[rows:], "target": 0.7, "margin": 0.8})
    fit_adapter(
        policy, pairs, pool, {"p": prompt}, recipe.fit, recipe.policy.lora, beta=0.1, seed=0, previous_adapter=None, output=folder / name
    )

def settle():
    gc.collect()
    return psutil.Process().memory_info().rss

policy = load_policy(recipe.policy)
fit(1, policy, "warmup")  # the libraries' own memory is not what is estimated
del policy
baseline = settle()
policy = load_policy(recipe.policy)
estimate = estimate_memory(policy, recipe, {}, prompt_length)
peak, done = [0], threading.Event()
def watch():
    process = psutil.Process()
    while not done.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
fit(64, policy, "adapter")
done.set(); thread.join()
expected = estimate["base"] + estimate["adapter"] + estimate["fit"]
print(json.dumps({"measured": (peak[0] - baseline) / 2**30, "expected": expected, **estimate}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read and trimmed the Linux way")
@pytest.mark.parametrize(
    ("quantization", "checkpointing", "shared", "targets"),
    [
        pytest.param("none", "false", "false", "all-linear", marks=pytest.mark.slow),
        pytest.param("nf4", "true", "false", "all-linear", marks=pytest.mark.slow),
        pytest.param("none", "false", "true", "all-linear", marks=pytest.mark.slow),
        pytest.param("none", "false", "false", WITH_HEAD, marks=pytest.mark.slow),
        pytest.param("none", "false", "true", WITH_HEAD, marks=pytest.mark.slow),
        ("nf4", "true", "true", "all-linear"),
    ],
)
def test_the_estimate_is_near_the_measured_peak_of_a_fit(quantization, checkpointing, shared, targets, tmp_path):
    from conftest import QUICKSTART

    command = [sys.executable, "-c", FIT, str(tmp_path), str(QUICKSTART), quantization, checkpointing, shared, targets]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | EXACT_MALLOC)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert 1 / TOLERANCE < found["expected"] / found["measured"] < TOLERANCE, found
