"""Model checkpoints before they are loaded: what may be loaded, what identifies it, and on which
device.

Two things run foreign code when a checkpoint is opened, and both are off unless the recipe names
them for that one model: pickled weights (`allow_pickle`; unpickled with torch's weights_only then)
and modelling code shipped with the checkpoint (`trust_remote_code`).
"""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.files import hash_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


PICKLED_WEIGHTS = "pytorch_model*.bin"


def check_model_folder(folder: Path, key: str, loader: str, allow_pickle: bool = False) -> None:
    """Raises UserError naming the first part (config, weights, tokenizer) that a local model folder
    lacks, or weights that are pickled."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"{key}: {folder} has no config.json, so {loader} cannot load it; point to a saved "
            "model"
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(folder.glob(PICKLED_WEIGHTS))
        if not pickled:
            raise UserError(
                f"{key}: {folder} has no *.safetensors weights; save the model with "
                "safe_serialization"
            )
        if not allow_pickle:
            raise UserError(
                f"{key}: {folder} has only pickled weights ({pickled[0].name}); "
                f"{_pickle_advice(key)}"
            )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{key}: {folder} has no tokenizer (tokenizer.json); save it beside the model"
        )


def check_adapter_folder(folder: Path, key: str) -> None:
    """Raises UserError where a folder is not an adapter in PEFT's format with safetensors
    weights."""
    if not folder.is_dir():
        raise UserError(
            f"{key}: {folder} is not a folder; give the folder of a LoRA adapter in PEFT's format"
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).exists():
            raise UserError(
                f"{key}: {folder} has no {name}; save the adapter with PEFT's save_pretrained "
                "(safetensors)"
            )


def _pickle_advice(key: str) -> str:
    return (
        f"save it as safetensors, or set {_sibling(key, 'allow_pickle')}: true if you trust "
        "whoever made it"
    )


def _sibling(key: str, name: str) -> str:
    """The dotted key beside policy.model; a scorer's message names the scorer already."""
    return (
        f"{key.rpartition('.')[0]}.{name}" if key.startswith("policy.") else f"the scorer's {name}"
    )


@contextlib.contextmanager
def explained_loading(key: str, source: str) -> Iterator[None]:
    """What transformers cannot load inside the block becomes one line that names the recipe's
    key."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (
        ImportError,  # of a library that a tokenizer or a kind of quantization needs
        OSError,
        ValueError,
        RuntimeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        text = str(error).strip() or type(error).__name__
        if "trust_remote_code" in text:
            raise UserError(
                f"{key}: {source} needs modelling code of its own, which is not run; read that "
                "code and set "
                f"{_sibling(key, 'trust_remote_code')}: true, or use a model that transformers "
                "knows"
            ) from error
        if "use_safetensors" in text:
            raise UserError(
                f"{key}: {source} has no safetensors weights; {_pickle_advice(key)}"
            ) from error
        reason = next(
            (line.strip() for line in text.splitlines() if "mismatch" in line), text.splitlines()[0]
        )
        raise UserError(f"{key}: {source} cannot be loaded ({reason})") from error


TOKENIZER_PROBE = "How can I help you today? Please tell me more about it."


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", source: str, revision: str | None, key: str
) -> None:
    """Raises UserError where the loaded tokenizer splits a plain English text otherwise than the
    checkpoint's tokenizer.json says.

    AutoTokenizer goes by the config's model_type for some architectures and rebuilds what it finds
    as that class: with another kind of tokenizer in the folder, words are lost without a message.
    """
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    path = (
        Path(source) / "tokenizer.json"
        if Path(source).is_dir()
        else try_to_load_from_cache(source, "tokenizer.json", revision=revision)
    )
    if not isinstance(path, str | Path) or not Path(path).exists():
        return
    saved = Tokenizer.from_file(str(path))
    saved.no_truncation()
    saved.no_padding()
    expected = saved.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
    ids = tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]
    if list(ids) != expected:
        raise UserError(
            f"{key}: transformers' {type(tokenizer).__name__} reads {path} otherwise than it was "
            f"saved (a probe has {len(ids)} tokens "
            f"for {len(expected)}); save the model with a tokenizer of its own architecture"
        )


def fingerprint_model(source: str, revision: str | None) -> str:
    """Hash of a model's identity: contents of a local folder (code included, pickled weights where
    there are no others), or the commit that a hub model resolved to."""
    folder = Path(source)
    digest = hashlib.sha256()
    if folder.is_dir():
        suffixes = {".safetensors", ".json", ".jinja", ".txt", ".model", ".py"}
        pickled = set() if any(folder.glob("*.safetensors")) else set(folder.glob(PICKLED_WEIGHTS))
        for path in sorted(folder.iterdir()):
            if (
                path.suffix in suffixes and path.name != "generation_config.json"
            ) or path in pickled:
                digest.update(f"{path.name}:{hash_file(path)}\n".encode())
    else:
        from transformers.utils import cached_file

        config = cached_file(source, "config.json", revision=revision)
        digest.update(f"{source}@{Path(config).parent.name}".encode())
    return digest.hexdigest()[:16]


def resolve_device(device: str, key: str) -> str:
    """`cpu`, `cuda`, or under a launch of several processes `cuda:N` with this process's own GPU.
    Raises UserError where a GPU is asked for and absent.

    The launcher's variables are read as accelerate reads them, so that models lie where the Trainer
    computes.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{key}: cuda was asked for but torch sees no GPU; set it to auto or cpu, or mend the "
            "driver"
        )
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")
    if device == "cpu" or not torch.cuda.is_available() or (device == "auto" and launched_on_cpu):
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    return "cuda" if local is None else f"cuda:{int(local) % torch.cuda.device_count()}"
