"""How warm and how short an answer is: a published lexicon's word, and a count."""

import functools
from collections.abc import Callable, Sequence

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
