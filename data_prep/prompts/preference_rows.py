"""The answers in a preference dataset's rows: as rows of a responses table, and which of two was
preferred.

An answer is complete, so its tokens end with the EOS that closes the assistant's turn. Nobody knows
the law it was drawn from: `sample_logp` and `policy_logp` are null, and no estimate that needs a
law may read these rows; they are for fitting. What is left out is counted by reason (`LEFT_OUT`).
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.prompts.layouts import answers_of, preferred, prompt_of
from data_prep.prompts.rows import source_name
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import parsed_rows, prompt_id
from data_prep.prompts.templates import (
    ENCODED_AT_ONCE,
    encode,
    lacking_template,
    rendered_prompts,
    write_chat,
)
from data_prep.readers.rows import LISTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)

SOURCE = "dataset"


LEFT_OUT = {
    "blank": "no text in it",
    "irregular": "not one answer to the row's prompt",
    "repeated": "the prompt has it already",
    "special": "holds the text of a special token",
    "too_long": "prompt and answer over the limit",
    "rows": "labelled, without two different answers that are kept",
    "repeated_rows": "the same label of the same two answers",
}


@dataclass
class DatasetAnswers:
    """Answers to some prompts. texts: by response_id, in the source's order; prompts: prompt_id by
    response_id.

    pairs: (preferred, other) response ids where a label was asked for; left_out: answers, and with
    a label rows, by reason.
    """

    texts: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    pairs: dict[tuple[str, str], None] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)

    def restrict(self, kept: Collection[str]) -> None:
        """Keeps these responses and the pairs among them."""
        self.texts = {rid: text for rid, text in self.texts.items() if rid in kept}
        self.prompts = {rid: self.prompts[rid] for rid in self.texts}
        pairs = {
            pair: None for pair in self.pairs if pair[0] in self.texts and pair[1] in self.texts
        }
        if lost := len(self.pairs) - len(pairs):
            self.left_out["rows"] += lost
        self.pairs = pairs


def read_answers(
    settings: PromptSettings,
    prompt_ids: Collection[str],
    *,
    label: str | None = None,
    test: bool = False,
) -> DatasetAnswers:
    """Read the answers to the prompts `prompt_ids` in the rows of prompts.source (of prompts.test
    with `test`); with `label` also its pairs.

    A response_id is a hash of prompt and answer, so that the source's order does not matter. Raises
    UserError listing malformed rows, and where the source has prompts alone. The first answers that
    are left out are named on stderr.
    """
    source, chat, prompts = settings.source, settings.format == "chat", set(prompt_ids)
    if test and not isinstance(settings.test, float):
        source = settings.test
    kept, places = DatasetAnswers(), list[str]()

    def parse(content: dict) -> tuple[str, list[str | None], int | None]:
        pid = prompt_id(prompt_of(content, chat))
        answers = answers_of(content, chat)
        if not answers:
            raise ValueError(
                f"no answers beside the prompt (it has {', '.join(map(str, content))})"
            )
        return pid, answers, None if label is None else preferred(content, label)

    for where, (pid, answers, better) in parsed_rows(source, parse):
        if pid not in prompts:
            continue
        ids = [_keep(kept, pid, answer, settings) for answer in answers]
        if None in ids and len(places) < LISTED:
            places.append(where)
        if better is not None:
            _add_pair(kept, ids, better)
    if not kept.texts:
        raise UserError(f"{source_name(source)}: no answers to the {len(prompts)} prompts in it")
    if places:
        what = ", ".join(
            f"{kept.left_out[why]} {why} ({LEFT_OUT[why]})"
            for why in ("blank", "irregular")
            if kept.left_out[why]
        )
        place = source_name(source)
        log.warning("%s: answers left out: %s; first in %s", place, what, ", ".join(places))
    return kept


def _keep(
    kept: DatasetAnswers, pid: str, answer: str | None, settings: PromptSettings
) -> str | None:
    """The id under which an answer is kept, or None where it is left out."""
    if answer is None or not answer.strip():
        kept.left_out["irregular" if answer is None else "blank"] += 1
        return None
    if settings.format == "chat":
        answer = answer.strip()
    elif settings.template[-1:].isspace():
        answer = answer.lstrip()  # the template has the space already
    rid = f"{SOURCE}/{pid}/{hashlib.sha256(answer.encode()).hexdigest()[:12]}"
    if rid in kept.texts:
        kept.left_out["repeated"] += 1
    kept.texts[rid], kept.prompts[rid] = answer, pid
    return rid


def _add_pair(kept: DatasetAnswers, ids: list[str | None], better: int) -> None:
    chosen, rejected = ids[better], ids[1 - better]
    if chosen is None or rejected is None or chosen == rejected:
        kept.left_out["rows"] += 1
    elif (chosen, rejected) in kept.pairs:
        kept.left_out["repeated_rows"] += 1
    else:
        kept.pairs[chosen, rejected] = None


def answer_table(
    answers: DatasetAnswers,
    prompts: pd.Series,
    prompt_tokens: dict[str, list[int]],
    settings: PromptSettings,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: tuple[int, ...],
    max_length: int,
) -> pd.DataFrame:
    """Rows of the responses table with `ref_logp` still null; (num_answers,) but for those counted
    in `answers.left_out`.

    prompts: the stored prompt by prompt_id. An answer is tokenized behind its prompt, where the
    prompt's tokens stay the same (a sentencepiece tokenizer would open an answer of its own with
    another token), else by itself; EOS follows. Longer ones than `max_length` tokens with their
    prompt are left out, and those in which a special token stands. `response` is the tokens' text.
    """
    closing = turn_end(settings, tokenizer, eos_ids)
    special = {*tokenizer.all_special_ids, *eos_ids} - {tokenizer.unk_token_id}
    parts = []
    ids = list(answers.texts)
    for begin in range(0, len(ids), ENCODED_AT_ONCE):
        batch = ids[begin : begin + ENCODED_AT_ONCE]
        pids = [answers.prompts[rid] for rid in batch]
        texts = [answers.texts[rid] for rid in batch]
        tokens = _encode_behind(
            [prompts[pid] for pid in pids],
            [prompt_tokens[pid] for pid in pids],
            texts,
            settings,
            tokenizer,
        )
        kept = []
        for row, (pid, answer_ids) in enumerate(zip(pids, tokens, strict=True)):
            if not answer_ids or not special.isdisjoint(answer_ids):
                answers.left_out["special" if answer_ids else "blank"] += 1
            elif len(prompt_tokens[pid]) + len(answer_ids) + 1 > max_length:
                answers.left_out["too_long"] += 1
            else:
                kept.append(row)
        decoded = []
        if kept:
            rows = [tokens[row] for row in kept]
            decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        columns = {
            "prompt_id": [pids[row] for row in kept],
            "response_id": [batch[row] for row in kept],
            "response": decoded,
            "token_ids": [np.array([*tokens[row], closing], dtype=np.int32) for row in kept],
        }
        parts.append(pd.DataFrame(columns))
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise UserError(
            f"prompts: all {len(ids)} answers of the dataset are left out "
            f"({counted(answers.left_out)}); look at fit.max_length"
        )
    answers.restrict(set(table["response_id"]))
    return table.assign(
        ended=True,
        source=SOURCE,
        sample_logp=np.nan,
        policy_logp=np.nan,
        ref_logp=np.nan,
        path_kl=np.nan,
    )


def given_pairs(answers: DatasetAnswers) -> pd.DataFrame:
    """The dataset's labels as `prompt_id, chosen_id, rejected_id`, (num_pairs,) rows. Raises
    UserError where there is none."""
    if not answers.pairs:
        raise UserError(
            "prompts: the dataset has no labelled pair of two answers to keep "
            f"({counted(answers.left_out)})"
        )
    chosen, rejected = zip(*answers.pairs, strict=True)
    return pd.DataFrame(
        {
            "prompt_id": [answers.prompts[rid] for rid in chosen],
            "chosen_id": chosen,
            "rejected_id": rejected,
        }
    )


def labelled(pairs: pd.DataFrame, score: pd.Series | None) -> pd.DataFrame:
    """`given_pairs` as a pairs table with target 1. score: s_λ by response_id (score units), of
    which prob and margin are; without one prob is 1 and margin 0."""
    margin = np.zeros(len(pairs))
    if score is not None:
        margin = (
            score.loc[pairs["chosen_id"]].to_numpy() - score.loc[pairs["rejected_id"]].to_numpy()
        )
    prob = np.ones(len(pairs)) if score is None else np.exp(-np.logaddexp(0.0, -margin))
    return pairs.assign(prob=prob, target=1.0, margin=margin)


def counted(left_out: dict[str, int]) -> str:
    return ", ".join(f"{number} {why}" for why, number in left_out.items() if number) or "nothing"


def _encode_behind(
    prompts: list[str],
    prompt_tokens: list[list[int]],
    answers: list[str],
    settings: PromptSettings,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[list[int]]:
    texts = [
        text + answer
        for text, answer in zip(
            rendered_prompts(prompts, settings, tokenizer), answers, strict=True
        )
    ]
    alone: list[int] = []
    tokens = []
    for row, (whole, prompt) in enumerate(
        zip(encode(texts, settings, tokenizer), prompt_tokens, strict=True)
    ):
        # may have swallowed the answer's first word
        unknown = prompt[-1] == tokenizer.unk_token_id
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt) or unknown:
            alone.append(row)
        closed = (
            len(whole) > len(prompt)
            and whole[-1] == tokenizer.eos_token_id
            and not answers[row].endswith(tokenizer.eos_token)
        )
        tokens.append(whole[len(prompt) : -1] if closed else whole[len(prompt) :])
    if alone:
        answer_ids = tokenizer(
            [answers[row] for row in alone], add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        for row, ids in zip(alone, answer_ids, strict=True):
            tokens[row] = ids
    return tokens


def turn_end(
    settings: PromptSettings, tokenizer: "PreTrainedTokenizerBase", eos_ids: tuple[int, ...]
) -> int:
    """The token that ends an answer: the first of `eos_ids` that the chat template puts behind the
    assistant's message, else EOS."""
    default = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_ids else eos_ids[0]
    if settings.format != "chat":
        return default
    if problem := lacking_template(tokenizer):
        raise UserError(f"prompts.format: chat, but the tokenizer has {problem}; set format: text")
    probe = "the answer"
    dialogue = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": probe}]
    behind = write_chat(tokenizer, dialogue, add_generation_prompt=False).rpartition(probe)[2]
    return next(
        (i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in eos_ids),
        default,
    )
