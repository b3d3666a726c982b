"""One loader of checkpoints for policy and scorers: weights are those of the checkpoint, all of
them, as the recipe stores them.

Checkpoints that their publisher quantized are dequantized by transformers where it knows how, and
refused elsewhere. Nothing is left out in silence: a scale that nobody reads makes every weight
another.
"""

import re
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.models.checkpoints import explained_loading
from data_prep.models.quantization import Quantization, quantization_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEQUANTIZED = ("compressed-tensors", "fp8", "mxfp4")
"""Publishers' formats that transformers can turn into plain weights while loading."""

LOADED_WITH = {"revision", "dtype", "allow_pickle", "trust_remote_code", "quantization"}
"""Settings that say how a checkpoint is loaded."""

OURS = "bitsandbytes"

UNREAD = re.compile(
    r"(rotary_emb\.inv_freq|rope\.freqs|position_ids|masked_bias|attn\.bias|attention\.bias|"
    r"num_batches_tracked|(^|\.)pooler\..*)$"
)
"""Tensors of older checkpoints that their architecture computes or does without."""


def load_checkpoint(
    loader: Any,
    source: str,
    key: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    allow_pickle: bool,
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
    keep: list[str] | None = None,
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model with `loader` (a transformers class) and what transformers says of it.

    keep: modules that stay unquantized. Raises a UserError of `key` where it cannot be loaded, and
    for a publisher's quantization that cannot be undone, or should be quantized again.
    """
    import torch
    from transformers import AutoConfig

    chosen = getattr(torch, dtype)
    with explained_loading(key, source):
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        settle_published(config, quantization, key, source)
        asked = quantization_config(quantization, chosen, keep)
        return loader.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=chosen,
            device_map={"": device},
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({} if asked is None else {"quantization_config": asked}),
            **more,
        )


def settle_published(
    config: "PretrainedConfig", quantization: Quantization, key: str, source: str
) -> None:
    """Asks for plain weights where the publisher quantized them.

    Raises a UserError of `key` for a format that cannot be undone, and where the recipe quantizes
    what is quantized already.
    """
    published = getattr(config, "quantization_config", None)
    inner = getattr(config.get_text_config(), "quantization_config", None)
    facts = published or inner
    if not facts:
        return
    facts = facts if isinstance(facts, dict) else facts.to_dict()
    four, eight = facts.get("load_in_4bit"), facts.get("load_in_8bit")
    method = str(facts.get("quant_method") or (OURS if four or eight else "an unknown method"))
    advice = "use its unquantized base"
    if method == OURS:  # `check_quantization` looks whether it is what was asked for
        return
    if quantization != "none":
        raise UserError(
            f"{key}: {source} is quantized by its publisher ({method}) and cannot be quantized "
            f"again to {quantization}; {advice}"
            + (", or quantization: none" if method in DEQUANTIZED else "")
        )
    groups = len(facts.get("config_groups") or {})
    if method not in DEQUANTIZED or not published or groups > 1:
        what = f"{method} with {groups} kinds of layers" if groups > 1 else method
        raise UserError(
            f"{key}: {source} is quantized by its publisher ({what}), which is not turned back "
            f"into plain weights here; {advice}"
        )
    config.quantization_config = facts | {"dequantize": True}


def require_used(loading: dict[str, Any], key: str, source: str) -> None:
    """Raises a UserError of `key` where tensors of the checkpoint have no place in the model."""
    odd = sorted(name for name in map(str, loading["unexpected_keys"]) if not UNREAD.search(name))
    if odd:
        raise UserError(
            f"{key}: {source}: tensors {', '.join(odd[:3])} ({len(odd)} in all) of the checkpoint "
            "have no place in the model, which would be another without them; use a checkpoint "
            "that its config describes"
        )
