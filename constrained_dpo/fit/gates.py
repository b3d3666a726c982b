"""Gates on a LoRA, row by row of a batch: what a conditional fit adds to PEFT's layers.

PEFT computes B(A x)·scale; a hook on A multiplies its output by the row's gates. So quantized and
plain bases, dropout, checkpointing and shared prompts are PEFT's own code. Source: docs/method.md,
The conditional policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from data_prep.errors import UserError


class Gates:
    """What the outputs of all A matrices are multiplied by. values: (num_rows, blocks · rank), a
    row for each row of what the model is given; None: ones."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.values: torch.Tensor | None = None

    def attach(self, model: PeftModel, adapter: str = "default") -> None:
        """Hook every A matrix of one of the model's adapters.

        Raises UserError for layers that cannot be gated: DoRA's, and embeddings.
        """
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if layer.lora_embedding_A or getattr(layer, "lora_variant", None):
                raise UserError(
                    f"fit.conditional: {name} cannot be gated (an embedding, or a variant such as "
                    "DoRA); leave it out of policy.lora.target_modules"
                )
            layer.lora_A[adapter].register_forward_hook(self._hook(name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def gated(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            if self.values is None:
                return output
            if len(output) != len(self.values):
                raise UserError(
                    f"fit.conditional: {name} sees the tokens of several rows together, so it "
                    "cannot be gated by row; leave it out of policy.lora.target_modules"
                )
            between = [1] * (output.dim() - 2)
            return output * self.values.to(output.dtype).view(len(output), *between, -1)

        return gated

    def set(self, gates: torch.Tensor | None, copies: int = 1) -> None:
        """Set the gates of the next forward and its backward.

        gates: (num_rows, blocks); copies: sequences of the batch for each row.
        """
        if gates is None:
            self.values = None
            return
        self.values = gates.repeat_interleave(self.rank, dim=1).repeat_interleave(copies, dim=0)

    @contextmanager
    def by_token(self, rows: torch.Tensor | None) -> Iterator[None]:
        """Gate tokens that lie side by side, as the head sees them; rows: (num_tokens,) the row of
        each, None: as set."""
        whole = self.values
        if whole is not None and rows is not None:
            self.values = whole[rows]
        try:
            yield
        finally:
            self.values = whole
