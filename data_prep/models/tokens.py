"""What models and tokenizers leave open: padding, windows, and control tokens in a user's text.

A control token is the tokenizer's or the template's to write. Where a person typed `</s>`, it is
four characters: read as control it would end the text, or be the EOS that a model counts.
"""

import re
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPEN, CLOSE = "\ue000", "\ue001"
"""Around the number of a control token that is meant as text; private use, in no real text."""


def set_padding(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", eos_ids: tuple[int, ...]
) -> None:
    """Pads with EOS where the tokenizer names no pad token, or one that the model does not embed;
    what is attended to is the mask's to say."""
    rows, pad = embedded_rows(model), tokenizer.pad_token_id
    if pad is not None and 0 <= pad < rows:
        return
    for number in (tokenizer.eos_token_id, *eos_ids, 0):
        token = None if number is None else tokenizer.convert_ids_to_tokens(number)
        if token is not None and number < rows:
            tokenizer.pad_token = token
            return


def embedded_rows(model: "PreTrainedModel") -> int:
    """How many tokens the model embeds."""
    return model.get_input_embeddings().weight.shape[0]


def window_of(model: "PreTrainedModel") -> int | None:
    """The longest sequence that the model accepts, in tokens; None if its config does not say.

    Positions of RoBERTa and its kin begin behind the padding index, so 514 of them hold 512 tokens.
    """
    from torch.nn import Embedding

    held = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, Embedding)
        and name.rpartition(".")[2] in ("position_embeddings", "embed_positions")
        and module.padding_idx is not None
    ]
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((number for number in (said, *held) if number and number > 0), default=None)


def as_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """The text with control tokens marked as what they are in it: characters. `encode` reads it."""
    for number, token in enumerate(_control(tokenizer)):
        text = text.replace(token, f"{OPEN}{number}{CLOSE}")
    return text


def encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = True
) -> dict[str, list[int]]:
    """Token ids and mask of a text that may hold marks of `as_text`."""
    if OPEN not in text:
        return dict(tokenizer(text, add_special_tokens=add_special_tokens))
    control = _control(tokenizer)
    pieces = re.split(f"({'|'.join(map(re.escape, control))})", text)
    ids: list[int] = []
    for piece in filter(None, pieces):
        if piece in control:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            shown = _shown(piece, control)
            ids += tokenizer(shown, add_special_tokens=False, split_special_tokens=True).input_ids
    if add_special_tokens:
        before, after = _frame(tokenizer("a").input_ids, _bare(tokenizer))
        ids = [*before, *ids, *after]
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase", first: str, second: str, room: int | None = None
) -> dict[str, list[int]]:
    """A pair of texts that hold marks of `as_text`, in the tokenizer's own pair format; `room`
    tokens at most, cut from the first one's beginning."""
    framed, bare = tokenizer("a", "a"), _bare(tokenizer)
    before, rest = _frame(framed["input_ids"], bare)
    between, after = _frame(rest, bare)
    left, right = (encode(tokenizer, text, False)["input_ids"] for text in (first, second))
    if room is not None:
        free = max(0, room - len(before) - len(between) - len(after))
        right = right[max(0, len(right) - free) :]
        left = left[max(0, len(left) - (free - len(right))) :]
    ids = [*before, *left, *between, *right, *after]
    encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if "token_type_ids" in framed:
        kinds = framed["token_type_ids"]
        start = len(before) + len(left) + len(between)
        encoded["token_type_ids"] = [kinds[0]] * start + [kinds[-1]] * (len(ids) - start)
    return encoded


def _control(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokenizer's control tokens, longest first."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return sorted({str(t) for t in added.values() if t.special}, key=lambda t: (-len(t), t))


def _shown(text: str, control: list[str]) -> str:
    return re.sub(f"{OPEN}(\\d+){CLOSE}", lambda match: control[int(match[1])], text)


def _bare(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return tokenizer("a", add_special_tokens=False).input_ids


def _frame(framed: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and behind `bare` where it first stands in `framed`."""
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start], framed[start + len(bare) :]
    raise UserError("a tokenizer changes a text's own tokens when it adds its special ones")
