"""`make bench-gpu`, where there is no GPU: its count of operations, and a try of the whole."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_gpu
from benchmarks.bench_fit import policy_of
from benchmarks.gpu_cases import FITS, RESPONSES, SIZES, Work, fit_flops, our_trainer, work_of
from data_prep.models.settings import PolicySettings

TINY, PROMPT, LENGTHS = SIZES["tiny"], 24, (16, 9, 12, 16, 5, 16, 3, 14)


def tiny_trainer(shared: bool, folder):
    """Our trainer on the tiny model, in float32 and with eager attention: matrix products alone,
    which torch counts."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_dict(TINY.config.to_dict())
    config._attn_implementation = "eager"
    policy = policy_of(
        transformers.LlamaForCausalLM(config),
        PolicySettings(model="random", quantization="none", dtype="float32", device="cpu"),
    )
    rng = np.random.default_rng(0)
    ids = lambda length: rng.integers(3, config.vocab_size, length).tolist()
    trainer, _ = our_trainer(policy, [(ids(PROMPT), list(map(ids, LENGTHS)))], shared, folder)
    return trainer


@pytest.mark.parametrize("shared", [True, False])
def test_operations_of_a_step_agree_with_torchs_count(shared, tmp_path):
    """torch counts what is masked, too, though no response needs it, and TRL's head, which on a CPU
    runs at every position."""
    trainer = tiny_trainer(shared, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    work, (rows, width) = work_of(batch), batch["input_ids"].shape
    tokens = sum(LENGTHS)
    if shared:
        pairs = (PROMPT - 1) ** 2 + sum(n * (PROMPT - 1 + n) for n in LENGTHS)
        assert work == Work(PROMPT - 1 + tokens, pairs, tokens)
        computed = dataclasses.replace(work, pairs=width**2)
    else:
        longest = PROMPT + max(LENGTHS)
        assert work == Work(RESPONSES * longest, RESPONSES * longest**2, tokens)
        computed = dataclasses.replace(work, scored=rows * (width - 1))
    trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    assert counter.get_total_flops() == pytest.approx(fit_flops(TINY, computed), rel=1e-4)


def test_no_case_begins_without_time(tmp_path, capsys):
    output = tmp_path / "out.json"
    bench_gpu.main([str(output), "--sizes", "tiny", "--device", "cpu", "--minutes", "0.5"])
    cases = json.loads(output.read_text())["cases"]
    assert [row["case"] for row in cases] == [*FITS, bench_gpu.SAMPLING]
    assert {row["not_run"] for row in cases} == {"0.5 minutes are too few"}
    assert capsys.readouterr().out.count("not run: 0.5 minutes are too few") == len(cases)


def test_peaks_by_the_names_that_torch_gives():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA T4"]
    assert list(map(bench_gpu.peak_flops, names)) == [989e12, 756e12, 312e12, None]


@pytest.mark.slow
def test_a_try_on_the_cpu(tmp_path, capsys):
    output = tmp_path / "out.json"
    bench_gpu.main([str(output), "--sizes", "tiny", "--device", "cpu"])
    ours, padded, trl, liger, sampling = json.loads(output.read_text())["cases"]
    assert [row["layout"] for row in (ours, padded, trl)][::2] == ["shared", "padded"]
    assert ours["work"]["positions"] < padded["work"]["positions"]
    assert padded["work"] == trl["work"]  # the same responses, and as many a step
    for row in (ours, padded, trl):
        seconds = np.median(row["step_seconds"]) + np.median(row["reference_seconds"])
        assert row["tokens_per_second"] == pytest.approx(RESPONSES * TINY.response / seconds)
    if importlib.util.find_spec("liger_kernel") is None:
        assert liger["not_run"] == "not installed"
    assert sampling["not_run"] == "no --vllm PYTHON"
    lines = capsys.readouterr().out.splitlines()
    ratio = ours["tokens_per_second"] / trl["tokens_per_second"]
    assert lines[2].split(" | ")[3] == f"{ratio:.2f}" and lines[4].split(" | ")[3] == "1.00"
