"""π_ref = base + supervised LoRA adapter (`policy.reference_adapter`): merged once into the
unquantized base, kept as a checkpoint.

Merging comes before quantization: LoRA merged into 4-bit weights is another model (peft#2321). What
is loaded, quantized, fingerprinted and exported afterwards is the merged checkpoint, an ordinary
model folder that nothing trains.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import UnixFileLock

from data_prep.errors import UserError
from data_prep.files import cache_folder, hash_file, sync_folder
from data_prep.models.attachment import (
    adapter_config,
    check_detachable,
    intact_base,
    require_same_tensors,
    require_untouched,
    tensor_marks,
)
from data_prep.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    check_adapter_folder,
    explained_loading,
    fingerprint_model,
)
from data_prep.models.loading import LOADED_WITH, load_checkpoint, require_used

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data_prep.models.policy import Policy
    from data_prep.models.settings import PolicySettings

KEY = "policy.reference_adapter"


# The tokenizer and the chat template that an adapter was trained with belong to it.
TOKENIZER_PARTS = {
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
}


def merged_reference(settings: "PolicySettings", base: str) -> Path:
    """Folder of the merged, unquantized π_ref checkpoint in the recipe's dtype; made now if it is
    not in the cache.

    base: folder or hub id of the base. The name is a hash of base, adapter (weights, config,
    tokenizer) and dtype, so a changed adapter is another reference. Raises UserError for an adapter
    that is incomplete, or was trained on another base.
    """
    adapter = Path(settings.reference_adapter or "").expanduser()
    check_adapter_folder(adapter, KEY)
    with explained_loading("policy.model", base):
        base_fingerprint = fingerprint_model(base, settings.revision)
    check_adapter_config(adapter, base, base_fingerprint, KEY, "set policy.model to that base")
    identity = {
        "base": base_fingerprint,
        "adapter": fingerprint_adapter(adapter),
        "dtype": settings.dtype,
    }
    folder = (
        cache_folder() / f"merged-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    )
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One process merges, the others wait; a kill releases the lock.
    with UnixFileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            merge_adapter(settings, base, adapter, temporary, KEY)
            (temporary / "merged_from.json").write_text(json.dumps(identity, indent=1))
            for path in temporary.iterdir():
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    return folder


def fingerprint_adapter(adapter: Path) -> str:
    """Hash of an adapter's weights, config and tokenizer."""
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "chat_template.jinja", *sorted(TOKENIZER_PARTS)):
        if (adapter / name).exists():
            digest.update(f"{name}:{hash_file(adapter / name)}\n".encode())
    return digest.hexdigest()[:16]


def check_adapter_config(
    adapter: Path, base: str, base_fingerprint: str, key: str, advice: str
) -> None:
    """Refuses an adapter that is not LoRA or says it was trained on another base; shapes do not
    tell two fine-tunes of one model apart.

    key: what messages call the adapter; advice: what to do where the base is another.
    """
    config = adapter_config(adapter, key)
    kind, trained_on = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise UserError(f"{key}: {adapter} is of PEFT type {kind}; only LORA is supported")
    if not trained_on:
        return
    if Path(trained_on).is_dir() and Path(base).is_dir():
        same = fingerprint_model(trained_on, None) == base_fingerprint
    else:
        same = Path(trained_on).name == Path(base).name
    if not same:
        raise UserError(
            f"{key}: {adapter} was trained on {trained_on}, not on {base}; {advice} "
            "(if it is the same model under another name, correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG})"
        )


def merge_adapter(
    settings: "PolicySettings", base: str, adapter: Path, output: Path, key: str
) -> None:
    """Saves base + adapter, unquantized in the settings' dtype, with the tokenizer at `output`; on
    the CPU, so that GPU memory does not limit it.

    base: folder or hub id; key: what messages call the adapter. Raises UserError for an adapter
    that does not fit the base.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    has_tokenizer = any((adapter / name).exists() for name in TOKENIZER_FILES)
    with explained_loading("policy.model", base):
        tokenizer = AutoTokenizer.from_pretrained(
            str(adapter) if has_tokenizer else base,
            revision=None if has_tokenizer else settings.revision,
            trust_remote_code=settings.trust_remote_code and not has_tokenizer,
        )
    whole = settings.model_copy(update={"quantization": "none"})
    model, loading = load_checkpoint(
        AutoModelForCausalLM,
        base,
        "policy.model",
        device="cpu",
        **whole.model_dump(include=LOADED_WITH),
    )
    require_used(loading, "policy.model", base)
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"{key}: {base} is a quantized checkpoint, into which nothing can be merged; give its "
            "unquantized base"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{key}: {adapter} comes with a tokenizer of {len(tokenizer)} tokens, {base} embeds "
            f"{rows}; give the adapter's own base"
        )
    try:
        with_adapter = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if "mismatch" in line),
            str(error).splitlines()[0],
        )
        raise UserError(
            f"{key}: {adapter} does not fit {base} ({reason}); it is an adapter of another base"
        ) from error
    check_all_loaded(with_adapter, adapter, base, key)
    _untie_adapted_head(with_adapter.get_base_model())
    try:
        merged = with_adapter.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{key}: {adapter} cannot be merged ({error})") from error
    _record_untied(merged)
    merged.generation_config.do_sample = (
        # lets sampling keys of the base's generation_config pass validation; they are kept
        True
    )
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _untie_adapted_head(model: "PreTrainedModel") -> None:
    """Gives the head weights of its own where it shares them with the embeddings and one of the two
    has an adapter layer: merged into shared weights, it would change both."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [model.get_output_embeddings(), model.get_input_embeddings()]
    bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
    head, words = bases
    if head.weight is words.weight and any(isinstance(layer, BaseTunerLayer) for layer in layers):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = (
            False
        )


def _record_untied(model: "PreTrainedModel") -> None:
    """Says in the config where head and embeddings no longer share weights, since an adapter
    trained one of them whole: read as tied, the other would be lost."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not words.weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = (
            False
        )


def check_all_loaded(model: "PreTrainedModel", adapter: Path, base: str, key: str) -> None:
    """PEFT leaves a layer that the file does not hold at its start (no change) and skips tensors it
    has no place for; both are refused."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    wrong = sorted(expected - stored) or sorted(stored - expected - set(model.state_dict()))
    if wrong:
        where = "not in" if wrong[0] in expected else "in"
        what = f"{wrong[0]} and {len(wrong) - 1} more tensors" if len(wrong) > 1 else wrong[0]
        raise UserError(
            f"{key}: {adapter} does not fit {base} ({what} {where} {ADAPTER_WEIGHTS}); it is an "
            "adapter of another base"
        )


@contextlib.contextmanager
def attached_adapter(policy: "Policy", adapter: Path | None) -> Iterator["PreTrainedModel"]:
    """The policy with the adapter of that folder (None: the reference policy itself), in eval mode;
    detached on leaving.

    Raises UserError for an adapter that cannot be taken off again.
    """
    if adapter is None:
        yield policy.model
        return
    check_detachable(Path(adapter), "adapter")
    from peft import PeftModel

    with intact_base(policy.model):
        same = require_same_tensors(policy.model, Path(adapter))
        before = tensor_marks(policy.model)
        with explained_loading("adapter", f"{adapter} (of another base, or damaged?)"):
            model = PeftModel.from_pretrained(policy.model, str(adapter), is_trainable=False)
        require_untouched(before, same, adapter)
        yield model.eval()
