"""How warm and how short an answer is: published lexicons' word, and counts. A run is aligned by
`friendly` and `brief`; `warm` and `compact` are second opinions that its gate asks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from data_prep.errors import UserError


@functools.cache
def _polarity() -> Callable[[str], dict[str, float]]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "friendly needs vaderSentiment: pip install 'constrained-dpo[smollm2]'"
        ) from error
    return SentimentIntensityAnalyzer().polarity_scores  # type: ignore[no-any-return]


def friendly(prompts: Sequence[object], responses: list[str]) -> list[float]:
    """Give the compound sentiment of VADER, in [−1, 1] (Hutto and Gilbert 2014: rated words, with
    negation and emphasis)."""
    polarity = _polarity()
    return [polarity(response)["compound"] for response in responses]


def brief(prompts: Sequence[object], responses: list[str]) -> list[float]:
    """Give −(number of words)/10: a margin of 1 asks for ten words fewer."""
    return [-len(response.split()) / 10 for response in responses]


@functools.cache
def _text_blob() -> Callable[[str], Any]:
    try:
        from textblob import TextBlob
    except ImportError as error:
        raise UserError("warm needs textblob: pip install 'constrained-dpo[smollm2]'") from error
    return TextBlob  # type: ignore[no-any-return]


def warm(prompts: Sequence[object], responses: list[str]) -> list[float]:
    """Give TextBlob's polarity, in [−1, 1]: the mean over the words of its own lexicon, which is
    another than VADER's."""
    return [float(_text_blob()(response).sentiment.polarity) for response in responses]


def compact(prompts: Sequence[object], responses: list[str]) -> list[float]:
    """Give −(number of characters)/100, at least −5: a margin of 1 asks for 100 characters
    fewer."""
    return [-min(5.0, len(response) / 100) for response in responses]
