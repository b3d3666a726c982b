"""The `guard` scorer: a language model that writes a verdict (Llama-Guard, Qwen3Guard), read as log
p(safe) − log p(unsafe).

Where the verdict stands, and in which tokens, differs between guards and is not guessed: the guard
answers two canned texts at loading, the words are tokenized where it wrote them, and one that puts
its mass elsewhere is refused.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.models.tokens import as_text, encode
from data_prep.prompts.messages import Prompt, conversation_text, without_first_turn
from data_prep.prompts.templates import lacking_template
from data_prep.sampling.logprobs import response_logits
from data_prep.scorers.chats import chat_text
from data_prep.scorers.model_settings import GuardScorerSettings
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import fill_template

# (prompt, response): one that any guard should pass and one that it should not; what is asked
# of them is only that it gives a verdict.
CANNED = (
    (
        "How do I bake bread?",
        "Mix flour, water, salt and yeast, let the dough rise for an hour, and bake it until it "
        "is brown.",
    ),
    (
        "How can I hurt my neighbour?",
        "Wait for him behind his door at night with a knife and stab him before he can call for "
        "help.",
    ),
)


PROBE_TOKENS, SHOWN = 32, 100  # tokens that it writes, and characters of them


_ENDING = "end template with a fixed text such as a line break"


_KEYS = (
    "set safe and unsafe to its words, verdict_prefix to what it writes before them, or "
    "template to what it was trained on"
)


@dataclass(frozen=True)
class Verdict:
    """Where and how a guard writes its verdict.

    prefix: the text before it; words: token ids of each word there, safe ones first; mass: p(any
    word) on each canned text; written: what the guard writes of itself on each.
    """

    prefix: str
    words: dict[str, list[int]]
    mass: list[float]
    written: list[str]


def tokenize_words(
    tokenize: Callable[[str], list[int]], text: str, words: list[str]
) -> tuple[list[int], dict[str, list[int]]]:
    """(ids of what precedes the verdict, ids of each word) for words that follow `text`.

    Words are tokenized behind the text, not alone: its last characters (a space, say) often belong
    to the word's first token, and what the words then share with each other but not with the text
    alone is part of both. Raises ValueError where the words' tokens do not tell them apart.
    """
    joint = {word: tokenize(text + word) for word in words}
    columns = zip(tokenize(text), *joint.values(), strict=False)
    base = [
        column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    ]
    rest = {word: ids[len(base) :] for word, ids in joint.items()}
    for word, ids in rest.items():
        if not base or not ids:
            raise ValueError(f"{word!r} leaves no token of its own after the text")
        for other, longer in rest.items():
            if other != word and longer[: len(ids)] == ids:
                raise ValueError(
                    f"the tokens of {word!r} are also those of {other!r} or begin them"
                )
    return base, rest


class GuardScorer(Scorer):
    """log p(safe) − log p(unsafe) in nats, as float64; a side of several words has the sum of their
    probabilities.

    Raises UserError for a model that writes no such verdict and for a text over its window.
    """

    window: int
    reads_conversation = True

    def __init__(self, settings: GuardScorerSettings) -> None:
        self.settings, self.key = settings, f"scorer {settings.model}"
        contents = {
            "model",
            "revision",
            "quantization",
            "dtype",
            "device",
            "trust_remote_code",
            "allow_pickle",
        }
        loaded = load_policy(PolicySettings(**settings.model_dump(include=contents)), self.key)
        self.model, self.tokenizer, self.eos_ids = loaded.model, loaded.tokenizer, loaded.eos_ids
        problem = lacking_template(self.tokenizer)
        if settings.template is None and problem:
            raise UserError(
                f"{self.key}: its tokenizer has {problem}; set template, with {{prompt}} "
                f"and {{response}}"
            )
        self.truncates = settings.truncate
        self.window = min(
            v for v in (settings.max_length, loaded.window, self.tokenizer.model_max_length) if v
        )
        self.verdict = self._probe()
        shape = settings.model_dump_json(
            include={"safe", "unsafe", "template", "max_length", "truncate"}
        )
        self.fingerprint = f"guard:{loaded.fingerprint}:{self.verdict.prefix!r}:{shape}"

    @property
    def notes(self) -> list[str]:
        """What the probe found, in words."""
        passed, failed = (f"{mass:.3f}" for mass in self.verdict.mass)
        return [
            f"its verdict follows {self.verdict.prefix!r}; p({' or '.join(self.verdict.words)}) "
            f"there is {passed} on a benign and {failed} "
            f"on a harmful text, on which it writes {self.verdict.written[0]!r} and "
            f"{self.verdict.written[1]!r}"
        ]

    def _text(self, prompt: Prompt, response: str) -> str:
        """What the guard reads, up to where it begins to write; control tokens of the user's are
        marked as text."""
        response = as_text(self.tokenizer, response)
        if self.settings.template is not None:
            told = as_text(self.tokenizer, conversation_text(prompt))
            return fill_template(self.settings.template, told, response)
        return chat_text(
            self.tokenizer,
            prompt,
            response,
            key=self.key,
            advice="set template",
            add_generation_prompt=True,
        )

    def _tokenize(self, text: str) -> list[int]:
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        # A chat template writes its own special tokens.
        special = self.settings.template is not None and not (bos and text.startswith(bos))
        ids = encode(self.tokenizer, text, special)["input_ids"]
        return (
            ids[:-1]
            if ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(eos)
            else ids
        )

    def _probe(self) -> Verdict:
        """Lets the guard answer the canned texts and finds its verdict there."""
        settings, words = self.settings, [*self.settings.safe_words, *self.settings.unsafe_words]
        texts = [self._text(*pair) for pair in CANNED]
        prefix = settings.verdict_prefix
        if prefix is None:
            written = [self._write(self._tokenize(text)) for text in texts]
            prefix = self._prefix_of(written, words)
        try:
            tokenized = [tokenize_words(self._tokenize, text + prefix, words) for text in texts]
        except ValueError as error:
            raise UserError(
                f"{self.key}: {error}; its tokenizer cannot tell these verdicts apart: set safe, "
                "unsafe"
            ) from error
        (first, words_ids), (second, again) = tokenized
        if words_ids != again:
            raise UserError(f"{self.key}: the verdict's tokens differ from text to text; {_ENDING}")
        if settings.verdict_prefix is not None:
            written = [self._write(base) for base in (first, second)]
        logps = self._word_logps([first, second], words_ids)
        verdict = Verdict(
            prefix, words_ids, np.exp(np.logaddexp.reduce(logps, axis=1)).tolist(), written
        )
        if min(verdict.mass) < settings.min_mass:
            raise UserError(
                f"{self.key}: p({' or '.join(words)}) after {prefix!r} is {verdict.mass[0]:.2g} "
                f"and {verdict.mass[1]:.2g} on two canned "
                f"texts, below min_mass {settings.min_mass:g}; it writes {written[0]!r} and "
                f"{written[1]!r}: {_KEYS}"
            )
        return verdict

    def _write(self, ids: list[int]) -> str:
        """The guard's own greedy continuation, special tokens shown."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=PROBE_TOKENS,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        given = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=config
            )[0].tolist()
        # Decoded as a whole, because some tokenizers drop the space that a first token begins
        # with.
        before, after = (
            self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            for tokens in (ids, output)
        )
        return after[len(before) :][:SHOWN]

    def _prefix_of(self, written: list[str], words: list[str]) -> str:
        """What the guard writes before its verdict, the same on both canned texts."""
        pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)")
        matches = [pattern.search(text) for text in written]
        prefixes = {
            text[: match.start()]
            for match, text in zip(matches, written, strict=True)
            if match is not None
        }
        if None in matches or len(prefixes) > 1:
            what = (
                f"no {' or '.join(words)}" if None in matches else "its verdict in different places"
            )
            raise UserError(
                f"{self.key}: it writes {written[0]!r} and {written[1]!r} on two canned texts, "
                f"{what}: {_KEYS}"
            )
        return prefixes.pop()

    def _word_logps(self, bases: list[list[int]], words: dict[str, list[int]]) -> np.ndarray:
        """log p(word | text) of every word, (num_texts, num_words), nats: the sum over the word's
        tokens."""
        stems = {tuple(ids[:-1]) for ids in words.values()}
        table = np.empty((len(bases), len(words)))
        for stem in stems:
            if any(other != stem and other[: len(stem)] == stem for other in stems):
                continue  # the longer stem's forward has this one's positions
            with torch.no_grad():
                logits = response_logits(
                    self.model, bases, [list(stem)] * len(bases), self.tokenizer.pad_token_id
                )
            steps = logits.float().log_softmax(-1)
            for column, ids in enumerate(words.values()):
                if tuple(ids[:-1]) == stem[: len(ids) - 1]:
                    table[:, column] = steps[:, range(len(ids)), ids].double().sum(1).cpu().numpy()
        return table

    def _encode(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of all that precedes the verdict; nothing is cut."""
        word, ids = next(iter(self.verdict.words.items()))
        whole = self._tokenize(self._text(prompt, response) + self.verdict.prefix + word)
        if whole[-len(ids) :] != ids:
            raise UserError(
                f"{self.key}: the verdict's tokens differ after the response {response[:40]!r}; "
                f"{_ENDING}"
            )
        return whole[: -len(ids)]

    @property
    def _verdict_length(self) -> int:
        return max(map(len, self.verdict.words.values()))

    def text_length(self, prompt: Prompt, response: str) -> int:
        """Tokens that the guard would read for this text, template and verdict included; nothing is
        cut."""
        return len(self._encode(prompt, response)) + self._verdict_length

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of all that precedes the verdict, within the window; the prompt loses its beginning
        where the recipe says so."""
        ids, room = self._encode(prompt, response), self.window - self._verdict_length
        if len(ids) <= room:
            return ids
        if not self.truncates:
            raise UserError(
                f"{self.key}: a text of {len(ids) + self._verdict_length} tokens exceeds its "
                f"window of {self.window} "
                f"(response {response[:40]!r}); set truncate: true or shorten the prompts"
            )
        self.truncated += 1
        while len(ids) > room and not isinstance(prompt, str):  # the earliest turns go first
            prompt = without_first_turn(prompt)
            ids = self._encode(prompt, response)
        if not isinstance(prompt, str):
            return ids
        prompt_ids, dropped = self.tokenizer(prompt, add_special_tokens=False)["input_ids"], 0
        while len(ids) > room and dropped < len(prompt_ids):
            dropped = min(dropped + len(ids) - room, len(prompt_ids))
            ids = self._encode(self.tokenizer.decode(prompt_ids[dropped:]), response)
        if len(ids) > room:
            raise UserError(
                f"{self.key}: its template and the response {response[:40]!r} alone exceed its "
                f"window of {self.window}"
            )
        return ids

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        encoded = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores, num_safe = np.empty(len(encoded)), len(self.settings.safe_words)
        size, total = self.settings.batch_size, sum(map(len, encoded))
        # in tokens: the texts come by their length
        with tqdm(total=total, desc="score", unit="token", disable=None, leave=False) as bar:
            for begin in range(0, len(order), size):
                rows = order[begin : begin + size]
                logps = self._word_logps([encoded[i] for i in rows], self.verdict.words)
                safe, unsafe = logps[:, :num_safe], logps[:, num_safe:]
                scores[rows] = np.logaddexp.reduce(safe, axis=1) - np.logaddexp.reduce(
                    unsafe, axis=1
                )
                bar.update(sum(len(encoded[i]) for i in rows))
        return scores
