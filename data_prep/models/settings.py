"""The keys of the recipe's `policy` block."""

from typing import Literal

from pydantic import Field

from data_prep.settings import LocalPath, Settings

POLICY = "policy"  # the block of the recipe that messages name

ROUNDING = {"float32": 0.002, "float16": 0.016, "bfloat16": 0.125}
"""Nats per token that two correct computations in a dtype may differ by, root mean square: 16 of
its epsilons in half precision (vLLM 0.32 beside transformers: 16 epsilons in float32, too, but
servers may compute float32 products in TF32)."""


class LoraSettings(Settings):
    """The adapter that is trained."""

    r: int = Field(8, ge=1, description="rank")
    alpha: float = Field(16, gt=0, description="LoRA alpha; the update is scaled by alpha/r")
    dropout: float = Field(
        0, ge=0, lt=1, description="dropout on the adapter's input while training"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="module names (the head's, as lm_head, may be among them), or all-linear "
        "(every linear layer but the head)",
    )


class PolicySettings(Settings):
    """The base model; with its adapter off it is the reference policy."""

    model: LocalPath = Field(
        description="local folder or hub id of a causal language model; `quickstart` is the "
        "embedded world's"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    reference_adapter: LocalPath | None = Field(
        None,
        description="LoRA adapter (PEFT folder) merged into the unquantized base: the reference "
        "policy is base + adapter",
    )
    quantization: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="storage of the frozen base"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="compute dtype"
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="T of the policy that is deployed: softmax(logits/T) is what is sampled, "
        "fitted, measured and judged; serve it at this temperature",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the policy runs; auto: the GPU where there is one"
    )
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with the checkpoint"
    )
    allow_pickle: bool = Field(
        False,
        description="accept pickled weights (pytorch_model.bin) where there are no safetensors",
    )
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the adapter")

    @property
    def reproducible(self) -> bool:
        """Whether log-probabilities agree to float32 rounding between batches. Half precision
        rounds more coarsely, and int8's activation scales depend on the batch."""
        return self.dtype == "float32" and self.quantization != "int8"
