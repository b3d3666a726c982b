"""What a recipe needs from the hub, and what of it is here."""

from pathlib import Path

from data_prep.settings import EMBEDDED


def needs_download(model: str, revision: str | None) -> bool:
    """True for what is neither a local path nor, with its weights, in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model == EMBEDDED or model.startswith((".", "/", "~")) or Path(model).exists():
        return False

    def cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(model, name, revision=revision), str)

    try:
        weights = (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
        return not (cached("config.json") and any(cached(name) for name in weights))
    except HFValidationError:
        return False  # no hub id either: loading it says what is wrong


def download_line(key: str, model: str) -> str:
    return (
        f"{key}: {model} needs a download (no such folder here; `hf download {model}` fetches it)"
    )


def not_here(path: str) -> str:
    return "" if Path(path).exists() else " (no such folder here yet)"
