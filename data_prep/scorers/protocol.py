"""What every scorer is: all that callers ask of one, with the answers of a scorer that has nothing
to say."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.prompts.messages import Prompt, told

TEXTS_PER_CALL = 4096
"""So many texts are scored between two writes to the cache: what a kill costs at most, and still
many batches of any model."""

Scored = tuple[list[int], np.ndarray]
"""Positions among the texts that were asked for, and their scores."""


class Scorer(ABC):
    """Judge (prompt, response) texts by numbers.

    fingerprint: identifies everything a score depends on; truncated: texts cut to the window in
    this process; window: the longest text in tokens, None without a limit; truncates: whether
    longer texts are cut to it instead of refused; reads_conversation: whether it is told a whole
    chat (as messages) instead of its last user text.
    """

    fingerprint: str
    truncated: int = 0
    window: int | None = None
    truncates: bool = False
    reads_conversation: bool = False

    @property
    def notes(self) -> list[str]:
        """What loading the scorer has shown, in words."""
        return []

    def told(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Say what this scorer is told of prompts: what `score` and `text_length` are to be
        given."""
        return [told(prompt, self.reads_conversation) for prompt in prompts]

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        """Score texts: (num_texts,) floats in the scorer's own units."""

    def batches(self, prompts: Sequence[Prompt], responses: list[str]) -> Iterator[Scored]:
        """Score texts batch by batch, so that each can be kept as soon as it is there."""
        for begin in range(0, len(prompts), TEXTS_PER_CALL):
            rows = slice(begin, begin + TEXTS_PER_CALL)
            yield list(range(len(prompts))[rows]), self.score(prompts[rows], responses[rows])

    def text_length(self, prompt: Prompt, response: str) -> int | None:
        """Count the tokens that the model would read for this text; None where there is none."""
        return None

    def quantization_drift(self) -> dict[str, Any] | None:
        """Measure how far quantization moves the scores; None where nothing is quantized."""
        return None

    def agreement(self) -> dict[str, Any] | None:
        """Compare with labelled preferences; None without a table of them."""
        return None

    def golden_score(self) -> float | None:
        """Score the text whose score is published; None for another model."""
        return None


class TokenScorer(Scorer):
    """A scorer of the sampled token ids themselves; where they are there, it is given them.

    reference_fingerprint: the policy whose log-probabilities `score_tokens` may be handed.
    """

    reference_fingerprint: str

    @abstractmethod
    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], ref_logp: np.ndarray | None
    ) -> np.ndarray:
        """Score token ids: (num_responses,) floats.

        ref_logp: (num_responses,) nats under the reference, NaN where unknown; None: all computed.
        """

    @abstractmethod
    def exact_scores(self, prompt_tokens: dict[str, list[int]]) -> np.ndarray:
        """Score every response of an enumerable world, (num_prompts, num_responses)."""
