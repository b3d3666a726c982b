"""Weights stored in 4 or 8 bits by bitsandbytes, for policy and scorers: how they are asked for,
and that they are what was asked for."""

from typing import TYPE_CHECKING, Literal

from data_prep.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


Quantization = Literal["nf4", "int8", "none"]


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


def check_quantization(model: "torch.nn.Module", quantization: Quantization, key: str) -> None:
    """A run that says nf4 must be nf4: several public 'QLoRA' runs were not quantized at all, or
    ran as fp4. Else a UserError of `key`."""
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


def keep_exact_on_cpu(model: "torch.nn.Module") -> None:
    """On a CPU with AVX512_BF16, bitsandbytes' Linear4bit repacks its weights in place at the first
    inference forward and later training forwards lose their autograd (LoRA gradients wrong by ~99
    %); switching that path off per layer keeps gradients exact."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
