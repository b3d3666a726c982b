"""Prompts that are read once for all their responses: their keys and values, a row for each
response."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


@dataclass(frozen=True)
class PromptRows:
    """Distinct prompts padded on the left, and which of them each response has.

    ids, mask: (num_distinct, width) token ids and 1 where they are a prompt's own; rows:
    (num_responses,) a number of a distinct prompt each.
    """

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    rows: "torch.Tensor"

    @classmethod
    def of(cls, prompts: list[list[int]], pad_id: int, device: "torch.device") -> "PromptRows":
        """Gather prompts, one for each response."""
        import torch

        numbers: dict[tuple[int, ...], int] = {}
        rows = torch.tensor([numbers.setdefault(tuple(p), len(numbers)) for p in prompts])
        width = max(map(len, numbers))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in numbers])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in numbers])
        return cls(ids.to(device), mask.to(device), rows.to(device))

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    def read(
        self, model: "PreTrainedModel", columns: int
    ) -> "tuple[DynamicCache, torch.Tensor] | None":
        """Read the first `columns` columns: keys and values with a row for each response, and the
        logits behind the last column, (num_responses, vocabulary).

        None where the model keeps anything else of what it has read, as recurrent layers do.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        with contiguous_head(model):
            output = model(
                input_ids=self.ids[:, :columns],
                attention_mask=self.mask[:, :columns],
                position_ids=(self.mask.cumsum(1) - 1).clamp(min=0)[:, :columns],
                use_cache=True,
                logits_to_keep=1,
            )
        cache = getattr(output, "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if not isinstance(cache, DynamicCache) or any(
            type(layer) not in plain for layer in cache.layers
        ):
            return None
        cache.batch_select_indices(self.rows)
        return cache, output.logits[:, -1][self.rows]


@contextmanager
def contiguous_head(model: "PreTrainedModel") -> Iterator[None]:
    """The head reads states that lie side by side. The last positions of every row do not, and
    their product with the head becomes a slow batched one that copies the head for every row."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(_side_by_side)
    try:
        yield
    finally:
        hook.remove()


def _side_by_side(module: object, inputs: "tuple[torch.Tensor, ...]") -> tuple:
    return (inputs[0].contiguous(), *inputs[1:])
