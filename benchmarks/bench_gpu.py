"""`make bench-gpu`: a fit's steps beside the installed TRL's on one GPU, and sampling with vLLM.

    python -m benchmarks.bench_gpu OUTPUT.json [--sizes 1b 8b] [--device cuda] [--minutes 8]
                                   [--vllm PYTHON]

gpu_cases.py says what a fit is; every one has a process of its own, and a size's ratios are to TRL
in the same run. The reference's log-probabilities count on both sides, once per response, as
relabelling repeats them every round. PYTHON is that of a venv with vLLM, which serves the same
shapes in bfloat16 with random weights (`--load-format dummy`) and takes the adapter at run time.
`--sizes tiny --device cpu` tries the script where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.bench_fit import LORA, peft_lora, policy_of, word_tokenizer
from benchmarks.gpu_cases import FITS, RESPONSES, SIZES, TRL, TRL_LIGER, Size
from data_prep.errors import UserError
from data_prep.models.settings import PolicySettings
from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.law import SamplingServer, SamplingSettings
from tests.helpers.servers import ServerProcess, free_port

PEAK_FLOPS = {
    "NVL": None,  # of the cards named so no listing was at hand
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 with float32 sums, by a part of the device's name (NVIDIA's data sheets, whose
figures with sparsity are twice these; RTX 4090: Ada whitepaper). The first that fits counts."""

SAMPLING, SAMPLED_PROMPTS = "vLLM", 32
FIRST_SECONDS = {"fit": 60.0, SAMPLING: 150.0}
"""What a case is taken to last before one of its size has been measured."""


def peak_flops(device: str | None) -> float | None:
    """Operations per second that the device can do at most; None for one that is not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in (device or "")), None)


def play_fit(size: str, case: str, device: str, seconds: float) -> dict[str, object]:
    """A fit in a process of its own, or why there is none."""
    if case == TRL_LIGER and importlib.util.find_spec("liger_kernel") is None:
        return {"not_run": "not installed"}
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "case.json", Path(folder) / "log"
        words = [sys.executable, "-m", "benchmarks.gpu_cases", size, case, device, str(output)]
        with log.open("w") as lines:
            try:
                subprocess.run(words, stdout=lines, stderr=lines, timeout=seconds, check=True)
            except subprocess.TimeoutExpired:
                return {"not_run": "stopped, the time was up"}
            except subprocess.CalledProcessError as error:
                last = [f"exit code {error.returncode}", *log.read_text().split("\n")]
                return {"not_run": f"failed: {[line for line in last if line.strip()][-1][:200]}"}
        return json.loads(output.read_text())


def save_served(size: Size, folder: Path) -> None:
    """What vLLM needs beside weights, which it makes up itself: folder/model without them, and
    folder/adapter."""
    size.config.architectures, size.config.dtype = ["LlamaForCausalLM"], "bfloat16"
    size.config.save_pretrained(folder / "model")
    word_tokenizer(size.config.vocab_size).save_pretrained(folder / "model")
    with torch.device("meta"):
        model = get_peft_model(transformers.LlamaForCausalLM(size.config), peft_lora())
    model.peft_config["default"].save_pretrained(folder / "adapter")
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    tensors = {name: 0.01 * torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def start_server(
    size: Size, device: str, python: str, folder: Path, seconds: float
) -> ServerProcess:
    """vLLM with adapters at run time; its log is folder/log."""
    os.environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(folder / "model"), "--served-model-name", "base"]
    command += ["--load-format", "dummy", "--enable-lora", "--max-lora-rank", str(LORA.r)]
    command += ["--max-model-len", str(size.prompt + size.response)]
    if device == "cpu":  # as tests/helpers/vllm.py
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        command += ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    return ServerProcess(command, port, "/health", folder / "log", patience=seconds)


def play_sampling(size: Size, device: str, python: str | None, seconds: float) -> dict[str, object]:
    """Tokens per second of the base and of an adapter, drawn as a run draws them; the first request
    of each, which loads the adapter, does not count."""
    if python is None:
        return {"not_run": "no --vllm PYTHON"}
    words = [python, "-c", "import vllm; print(vllm.__version__)"]
    try:
        version = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"not_run": f"{python} cannot import vllm"}
    rng, end = np.random.default_rng(0), time.monotonic() + seconds
    result: dict[str, object] = {"vllm": version.stdout.split()[-1], "adapter_rank": LORA.r}
    with tempfile.TemporaryDirectory() as name:
        save_served(size, Path(name))
        try:
            server = start_server(size, device, python, Path(name), seconds)
        except RuntimeError as error:
            return {"not_run": f"failed: {str(error).splitlines()[-1][:200]}"}
        try:
            with torch.device("meta"):
                model = transformers.LlamaForCausalLM(size.config)
            policy = policy_of(model, PolicySettings(model="random", device="cpu"))
            settings = SamplingServer(
                base_url=f"{server.url}/v1",
                model="base",
                concurrency=SAMPLED_PROMPTS,
                timeout=max(1.0, end - time.monotonic()),
                retries=0,
            )
            servers, law = (
                CompletionServers(settings),
                SamplingSettings(max_new_tokens=size.response),
            )
            for what, adapter in (("base", None), ("adapter", Path(name) / "adapter")):
                prompts = rng.integers(3, size.config.vocab_size, (SAMPLED_PROMPTS, size.prompt))
                servers.complete(policy, prompts[:1].tolist(), RESPONSES, law, adapter, 0)
                begin = time.perf_counter()
                choices, _ = servers.complete(policy, prompts.tolist(), RESPONSES, law, adapter, 1)
                taken = time.perf_counter() - begin
                tokens = sum(len(choice["token_ids"]) for choice in choices)
                result[what] = {"tokens": tokens, "seconds": taken}
            servers.release()
        except UserError as error:
            return {"not_run": f"failed: {error}"}
        finally:
            server.kill()
    return result


def play(arguments: argparse.Namespace) -> list[dict]:
    """Every case in turn while there is time for another one."""
    end, done = time.monotonic() + 60 * arguments.minutes, list[dict]()
    cases = [(size, case) for size in arguments.sizes for case in FITS]
    for size, case in [*cases, *((size, SAMPLING) for size in arguments.sizes)]:
        kind = SAMPLING if case == SAMPLING else "fit"
        alike = [
            row["wall_seconds"]
            for row in done
            if row["size"] == size and row["kind"] == kind and "not_run" not in row
        ]
        begin = time.monotonic()
        left = end - begin
        if left < max(alike, default=FIRST_SECONDS[kind]):
            result: dict[str, object] = {"not_run": f"{arguments.minutes:g} minutes are too few"}
        elif kind == SAMPLING:
            result = play_sampling(SIZES[size], arguments.device, arguments.vllm, left)
        else:
            result = play_fit(size, case, arguments.device, left)
        wall = time.monotonic() - begin
        done.append({"size": size, "case": case, "kind": kind, "wall_seconds": wall} | result)
        print(f"{size}, {case}: {wall:.0f} s", file=sys.stderr, flush=True)
    return done


def fit_lines(done: list[dict]) -> list[str]:
    """The fits as a Markdown table."""
    lines = [
        "| model | fit | response tokens/s | × TRL | step, s | reference, s | MFU of the step "
        "| peak memory, step / reference, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    fits = [row for row in done if row["kind"] == "fit"]
    trl = {r["size"]: r["tokens_per_second"] for r in fits if r["case"] == TRL and "layout" in r}
    for row in fits:
        if "not_run" in row:
            lines.append(f"| {row['size']} | {row['case']} | not run: {row['not_run']} |||||||")
            continue
        rate, peak = row["tokens_per_second"], peak_flops(row.get("device"))
        ratio = f"{rate / trl[row['size']]:.2f}" if row["size"] in trl else "–"
        used = f"{100 * row['flops_per_second'] / peak:.0f} %" if peak else "–"
        held = [row["step_peak_bytes"], row["reference_peak_bytes"]]
        memory = " / ".join("–" if b is None else f"{b / 1e9:.1f}" for b in held)
        step, reference = np.median(row["step_seconds"]), np.median(row["reference_seconds"])
        lines.append(
            f"| {row['size']} | {row['case']} | {rate:.0f} | {ratio} | {step:.3f} | "
            f"{reference:.3f} | {used} | {memory} |"
        )
    padded = [r for r in fits if r["case"] == FITS[0] and r.get("layout", "shared") != "shared"]
    return lines + [f"{r['size']}, {r['case']}: prompts not shared, {r['layout']}" for r in padded]


def sampling_lines(done: list[dict]) -> list[str]:
    """Sampling as a Markdown table."""
    lines = [
        "| model | sampling | tokens/s, base | tokens/s, adapter | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in done:
        if row["kind"] == SAMPLING and "not_run" in row:
            lines.append(f"| {row['size']} | vLLM | not run: {row['not_run']} |||")
        elif row["kind"] == SAMPLING:
            base, adapter = (row[w]["tokens"] / row[w]["seconds"] for w in ("base", "adapter"))
            ratio = adapter / base
            lines.append(
                f"| {row['size']} | vLLM {row['vllm']} | {base:.0f} | {adapter:.0f} | {ratio:.2f} |"
            )
    return lines


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no case that takes longer"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="python of a venv that has vLLM")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try the script by --sizes tiny --device cpu")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parsed(words)
    done = play(arguments)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    given = {key: value for key, value in vars(arguments).items() if key != "output"}
    record = {"options": given, "versions": versions, "cases": done}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1))
    print("\n".join([*fit_lines(done), "", *sampling_lines(done)]))


if __name__ == "__main__":
    main()
