"""The policy: a base model (nf4, int8 or unquantized), its tokenizer, and LoRA adapters from disk.

The reference policy π_ref is the base with no adapter (that base may itself be base + supervised
adapter, merged before it is quantized: `adapters`). It is loaded once, frozen, and never
merged into; an adapter is attached for as long as a `with` block lasts.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.models.adapters import merged_reference
from data_prep.models.checkpoints import (
    check_model_folder,
    check_tokenizer,
    explained_loading,
    fingerprint_model,
    resolve_device,
)
from data_prep.models.loading import LOADED_WITH, load_checkpoint, require_used
from data_prep.models.quantization import check_quantization, keep_exact_on_cpu
from data_prep.models.settings import POLICY, PolicySettings
from data_prep.models.temperature import temper
from data_prep.models.tokens import embedded_rows, set_padding, window_of
from data_prep.settings import EMBEDDED

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A loaded base and what belongs to it.

    model: the plain base in eval mode, requires_grad off, tempered, its generation_config blank but
    for token ids; eos_ids: what ends a response; fingerprint: hash of weights, tokenizer,
    quantization, dtype and temperature; overridden: generation settings of the checkpoint that our
    sampling law replaces, by name.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    settings: PolicySettings
    eos_ids: tuple[int, ...]
    fingerprint: str
    overridden: dict[str, object]

    @property
    def device(self) -> "torch.device":
        return self.model.get_input_embeddings().weight.device

    @property
    def window(self) -> int | None:
        """The longest sequence the base accepts, in tokens (None if its config does not say)."""
        return window_of(self.model)


def resolve_model(settings: PolicySettings, owner: str = POLICY) -> str:
    """The folder or hub id of the unquantized π_ref: the base, or base and `reference_adapter`
    merged. Built now where it has to be.

    owner: whose model it is, for messages. Raises UserError for an unusable folder or adapter.
    """
    base = _resolve_base(settings, owner)
    if settings.reference_adapter is None:
        return base
    return str(merged_reference(settings, base))


def _key(owner: str, name: str) -> str:
    """What messages call a key: `policy.model`, or for a scorer's model its own name before the
    key."""
    return f"{owner}.{name}" if owner == POLICY else f"{owner}: {name}"


def _resolve_base(settings: PolicySettings, owner: str) -> str:
    """The folder or hub id of the base; builds the embedded world's policy when asked for it."""
    if settings.model == EMBEDDED:
        from data_prep.quickstart import build_policy

        return str(build_policy())
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        check_model_folder(
            folder, _key(owner, "model"), "AutoModelForCausalLM", settings.allow_pickle
        )
        return str(folder)
    if settings.model.startswith((".", "/", "~")) or folder.exists():
        raise UserError(
            f"{_key(owner, 'model')}: {settings.model} is not a folder; give a model folder or a "
            "hub id"
        )
    return settings.model


def load_policy(settings: PolicySettings, owner: str = POLICY) -> Policy:
    """Loads base and tokenizer; owner: whose model it is, for messages (a scorer may have a causal
    language model of its own).

    Raises UserError when the model cannot be loaded or is not quantized as asked.
    """
    from transformers import GenerationConfig

    source = resolve_model(settings, owner)
    model, tokenizer = _load(settings, source, owner)
    eos_ids = _eos_ids(model, tokenizer, owner)
    set_padding(tokenizer, model, eos_ids)
    overridden = _overridden_generation(model.generation_config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(eos_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    identity = [
        fingerprint_model(source, settings.revision),
        settings.quantization,
        settings.dtype,
        settings.trust_remote_code,
    ]
    if settings.temperature != 1.0:  # without one as before there were any
        identity.append(settings.temperature)
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Policy(model, tokenizer, settings, eos_ids, fingerprint, overridden)


def _load(
    settings: PolicySettings, source: str, owner: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer: whole, quantized as asked, without dropout, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, key = resolve_device(settings.device, _key(owner, "device")), _key(owner, "model")
    with explained_loading(key, source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    model, loading = load_checkpoint(
        AutoModelForCausalLM, source, key, device=device, **settings.model_dump(include=LOADED_WITH)
    )
    check_tokenizer(tokenizer, source, settings.revision, key)
    if fresh := sorted(loading["missing_keys"]):
        raise UserError(
            f"{key}: {source}: weights {', '.join(fresh[:3])} are not in the "
            "checkpoint and were newly initialised; save it whole"
        )
    require_used(loading, key, source)
    check_quantization(model, settings.quantization, _key(owner, "quantization"))
    keep_exact_on_cpu(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # π_ref has no dropout; the adapter's own is added later and kept
    model.requires_grad_(False)
    model.eval()
    temper(model, settings.temperature)
    return model, tokenizer


def _eos_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", owner: str
) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    ids = set(
        configured if isinstance(configured, list) else [] if configured is None else [configured]
    )
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise UserError(
            f"{_key(owner, 'model')}: neither tokenizer nor generation_config names an EOS token, "
            "so no response could end"
        )
    rows = embedded_rows(model)
    known = sorted(number for number in ids if 0 <= number < rows)
    if not known:
        raise UserError(
            f"{_key(owner, 'model')}: its EOS token ({min(ids)}) lies outside the model's "
            f"vocabulary of {rows}, so no response could end; save it with a token that it knows"
        )
    return tuple(known)


def _overridden_generation(config: "GenerationConfig") -> dict[str, object]:
    """What the checkpoint's generation_config would have changed about sampling; ours is complete,
    so none of it applies."""
    ignored = {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "_from_model_config",
        "use_cache",
    }
    ignored |= {
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict_in_generate",
        "do_sample",
    }
    return {k: v for k, v in config.to_diff_dict().items() if k not in ignored and v is not None}
