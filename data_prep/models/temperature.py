"""The tempered policy: softmax(logits / T) in place of softmax(logits), for everything that reads a
model's logits.

The division stands where logits leave the model, in its `forward`. So sampling, log-probabilities,
enumeration and fits see one policy, and adapters, soft caps and scales of the head come before it.
A forward that never makes logits (fused heads) asks `temperature_of` or `divided`.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ATTRIBUTE = "policy_temperature"


def temper(model: "torch.nn.Module", temperature: float) -> None:
    """Let the model's logits leave it divided by `temperature`, in float32. At 1 nothing changes.

    In `forward` itself and not in a hook: PEFT calls its base's `forward`, which runs no hooks.
    """
    if temperature == 1.0:
        return
    bound: Any = model.forward
    original = bound.__func__  # of the model that it is called on, a copy's too

    @functools.wraps(original)
    def forward(self: "torch.nn.Module", *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = divided(self, output.logits)
        return output

    model.forward = types.MethodType(forward, model)
    setattr(model, ATTRIBUTE, temperature)


def temperature_of(model: "torch.nn.Module") -> float:
    """The temperature of a model, or of the one that PEFT has wrapped."""
    return float(getattr(model, ATTRIBUTE, 1.0))


def divided(model: "torch.nn.Module", logits: "torch.Tensor") -> "torch.Tensor":
    """Divide logits of the model's head by its temperature; as they are at 1."""
    temperature = temperature_of(model)
    return logits if temperature == 1.0 else logits.float() / temperature


@contextmanager
def untempered(model: "torch.nn.Module") -> Iterator[None]:
    """The model at temperature 1 for a while: what a DPO-trained adapter's implicit reward is
    defined by."""
    temperature = temperature_of(model)
    if temperature == 1.0:
        yield
        return
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    setattr(base, ATTRIBUTE, 1.0)
    try:
        yield
    finally:
        setattr(base, ATTRIBUTE, temperature)
