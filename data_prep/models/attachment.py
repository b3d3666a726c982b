"""A LoRA adapter on a loaded base for a while: the base comes back exactly, or the adapter is
refused.

PEFT's own `unload` is not enough: modules that an adapter trains whole (`modules_to_save`) stay in
the base. And some adapters write into the base's own tensors (biases, resized embeddings, PiSSA),
where nothing can be taken off again and switching the adapter off does not give π_ref either.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_adapter_folder,
    explained_loading,
)

if TYPE_CHECKING:
    import torch

WRITTEN_BY = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that change the base's weights when the adapter is attached."""

ADAPTER_PARTS = (".lora_", ".trainable_tokens_delta", ".token_adapter.", ".modules_to_save.")
"""What marks an adapter's own tensors in its file."""


@contextlib.contextmanager
def intact_base(model: "torch.nn.Module") -> Iterator[None]:
    """Takes off `model` what the block put on it: every module stands where it stood, frozen and in
    eval mode."""
    before = [(parent, dict(parent._modules)) for parent in model.modules()]
    try:
        yield
    finally:
        for parent, children in before:
            parent._modules.clear()
            parent._modules.update(children)
        model.__dict__.pop("peft_config", None)
        model.requires_grad_(False)
        model.eval()


def check_detachable(adapter: Path, key: str) -> None:
    """Raises a UserError of `key` for a folder that is no LoRA adapter in PEFT's format, or one
    that is known to write into the base's own tensors."""
    check_adapter_folder(adapter, key)
    config = adapter_config(adapter, key)
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{key}: {adapter} is of PEFT type {kind}; only LORA is supported")
    advice = "it cannot be taken off again; merge it into the base and use the merged model"
    if (bias := config.get("bias") or "none") != "none":
        raise UserError(f"{key}: {adapter} trains the base's own biases (bias: {bias}); {advice}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(WRITTEN_BY):
        raise UserError(
            f"{key}: {adapter} changes the base when it is attached (init_lora_weights: {start}); "
            "save it as plain LoRA, with save_pretrained's path_initial_model_for_weight_conversion"
        )
    if config.get("layer_replication"):
        raise UserError(f"{key}: {adapter} repeats the base's layers (layer_replication); {advice}")


def check_lora_only(adapter: Path, key: str) -> None:
    """Raises a UserError of `key` for an adapter that holds more than LoRA layers: put into another
    adapter, or on a server, the rest would be lost or land in the base."""
    check_detachable(adapter, key)
    whole, tokens = whole_modules(adapter, key), adapter_config(adapter, key)
    if tokens.get("trainable_token_indices"):
        whole = [*whole, "trainable_token_indices"]
    if whole := whole or base_tensors(adapter, key):
        raise UserError(
            f"{key}: {adapter} holds more than LoRA layers ({', '.join(whole[:3])}), which cannot "
            "be taken over here; merge it into the base (policy.reference_adapter)"
        )


def whole_modules(adapter: Path, key: str) -> list[str]:
    """Names of the modules that an adapter trains whole (modules_to_save)."""
    return list(adapter_config(adapter, key).get("modules_to_save") or [])


def adapter_config(adapter: Path, key: str) -> dict[str, Any]:
    """The adapter's config; raises a UserError of `key` where it is no JSON mapping."""
    path = adapter / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} is not a JSON mapping ({error})") from error
    return config


def base_tensors(adapter: Path, key: str) -> list[str]:
    """Names in an adapter's file that are tensors of the base itself: neither LoRA's own nor of a
    module that is trained whole."""
    from safetensors import safe_open

    whole = tuple(whole_modules(adapter, key))
    with (
        explained_loading(key, str(adapter)),
        safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as file,
    ):
        names = list(file.keys())
    return [
        name
        for name in names
        if not any(part in name for part in ADAPTER_PARTS)
        and not any(owner.endswith(whole) for owner in _owners(name))
    ]


def _owners(name: str) -> list[str]:
    """The modules that a tensor lies in, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def require_same_tensors(model: "torch.nn.Module", adapter: Path) -> set[str]:
    """Names of the base's tensors that the adapter's file holds too (PEFT saves embeddings that are
    a target); raises UserError where their values are others."""
    import torch
    from safetensors import safe_open

    own, same = dict(model.named_parameters(remove_duplicate=False)), set()
    found = base_tensors(adapter, "adapter")
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as file:
        for name in found:
            place = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            tensor, stored = own.get(place), file.get_tensor(name)
            if tensor is None:
                continue  # `check_all_loaded` names tensors that have no place
            if not torch.equal(stored.to(tensor.dtype), tensor.cpu()):
                raise UserError(
                    f"adapter: {adapter} holds another {place} than the base (a resized "
                    "vocabulary, or another base?), which cannot be taken off again; merge it "
                    "into its base and use the merged model"
                )
            same.add(place)
    return same


def tensor_marks(model: "torch.nn.Module") -> "dict[str, tuple[torch.Tensor, int, int]]":
    """By name each tensor of the base, with where it lies and how often it was written to."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t, t.data_ptr(), t._version) for name, t in tensors.items()}


def require_untouched(
    before: "dict[str, tuple[torch.Tensor, int, int]]", allowed: set[str], adapter: Path
) -> None:
    """Raises UserError where the base's tensors were written to while the adapter was attached."""
    changed = [
        name
        for name, (tensor, place, version) in before.items()
        if (tensor.data_ptr(), tensor._version) != (place, version) and name not in allowed
    ]
    if changed:
        raise UserError(
            f"adapter: {adapter} writes into the base's own weights ({changed[0]}; {len(changed)} "
            "in all), so it cannot be taken off again; merge it into the base and use the merged "
            "model"
        )
