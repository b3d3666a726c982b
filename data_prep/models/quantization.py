"""Weights stored in 4 or 8 bits by bitsandbytes, for policy and scorers: how they are asked for,
and that they are what was asked for."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


Quantization = Literal["nf4", "int8", "none"]

MOST_OUTSIDE = 0.05
"""Share of the weights that may stay unquantized: norms, biases and routers are far below."""


def quantization_config(
    quantization: Quantization, dtype: "torch.dtype", keep: list[str] | None = None
) -> "BitsAndBytesConfig | None":
    """What `from_pretrained` takes: nf4 with double quantization, LLM.int8, or None. keep: modules
    left alone (None: the output head)."""
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=keep,
        )
    return (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
        if quantization == "int8"
        else None
    )


def check_quantization(
    model: "torch.nn.Module",
    quantization: Quantization,
    key: str,
    keep: Collection[str] | None = None,
) -> None:
    """Require that a model is stored as asked: several public 'QLoRA' runs were not quantized at
    all, ran as fp4, or left fused experts in 16 bits.

    keep: names of modules that are left alone on purpose, as for `quantization_config`. Embeddings
    and the output head do not count. Raises a UserError of `key` otherwise.
    """
    import bitsandbytes as bnb

    four = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    eight = [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    kinds = {getattr(module.weight, "quant_type", None) for module in four}
    if quantization == "nf4" and kinds != {"nf4"}:
        raise UserError(
            f"{key}: nf4 was asked for but {len(four)} layers are Linear4bit/nf4; use another "
            "model or none"
        )
    if quantization == "int8" and not eight:
        raise UserError(
            f"{key}: int8 was asked for but no layer is Linear8bitLt; use another model or none"
        )
    if quantization == "none" and (four or eight):
        raise UserError(
            f"{key}: none was asked for but the checkpoint is quantized; use its unquantized base"
        )
    if quantization != "none":
        _require_mostly_quantized(model, quantization, key, frozenset(keep or ()))


def _require_mostly_quantized(
    model: "torch.nn.Module", quantization: Quantization, key: str, keep: frozenset[str]
) -> None:
    import bitsandbytes as bnb
    import torch

    quantized, outside = 0, dict[str, int]()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            quantized += module.in_features * module.out_features
        elif isinstance(module, torch.nn.Embedding) or module is head:
            continue
        elif not keep.intersection((name, *name.split("."))):
            size = sum(p.numel() for p in module.parameters(recurse=False))
            outside[name] = size
    left = sum(outside.values())
    if left > MOST_OUTSIDE * (quantized + left):
        largest = max(outside, key=outside.__getitem__)
        raise UserError(
            f"{key}: {quantization} was asked for but {100 * left / (quantized + left):.0f} % of "
            f"the weights stay in 16 bits or more (the most in {largest}; bitsandbytes quantizes "
            "Linear layers alone, not fused experts); use another model or none"
        )


def keep_exact_on_cpu(model: "torch.nn.Module") -> None:
    """On a CPU with AVX512_BF16, bitsandbytes' Linear4bit repacks its weights in place at the first
    inference forward and later training forwards lose their autograd (LoRA gradients wrong by ~99
    %); switching that path off per layer keeps gradients exact."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
