"""Scorers: real-valued judgements of (prompt, response) texts, and what a recipe makes of their
scores; nothing is scored twice."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError
from data_prep.prompts.messages import Prompt
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.functions import ColumnScorer, PythonScorer
from data_prep.scorers.model_settings import BeaverScorerSettings, GuardScorerSettings
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.protocol import TEXTS_PER_CALL, Scored, Scorer, TokenScorer
from data_prep.scorers.settings import (
    ColumnScorerSettings,
    HttpScorerSettings,
    ImplicitScorerSettings,
    PythonScorerSettings,
    ScorerSettings,
)

if TYPE_CHECKING:
    from data_prep.scorers.implicit import PolicyHandle


def make_scorer(settings: ScorerSettings, handle: "PolicyHandle | None" = None) -> Scorer:
    """Make the scorer that the settings describe (models are loaded at once); handle: the recipe's
    policy, which implicit scorers need.

    Raises UserError for what cannot be used.
    """
    if isinstance(settings, PythonScorerSettings):
        return PythonScorer(settings)
    if isinstance(settings, ColumnScorerSettings):
        return ColumnScorer(settings)
    if isinstance(settings, BeaverScorerSettings):
        from data_prep.scorers.beaver import BeaverScorer

        return BeaverScorer(settings)
    if isinstance(settings, GuardScorerSettings):
        from data_prep.scorers.guard import GuardScorer

        return GuardScorer(settings)
    if isinstance(settings, ImplicitScorerSettings):
        from data_prep.scorers.implicit import ImplicitScorer

        return ImplicitScorer(settings, handle)
    if isinstance(settings, HttpScorerSettings):
        from data_prep.scorers.http import HttpScorer

        return HttpScorer(settings)
    from data_prep.scorers.classifier import ClassifierScorer

    return ClassifierScorer(settings)


def apply_options(scores: np.ndarray, options: ScorerOptions) -> np.ndarray:
    """What a recipe says of a scorer's raw scores, any shape: negated, then as an indicator 1[score
    ≥ t] or clipped to [low, high]."""
    scores = -scores if options.negate else scores
    if options.indicator is not None:
        return (scores >= options.indicator).astype(np.float64)
    if options.clip is None:
        return scores
    low, high = options.clip
    return np.clip(scores, low, high)


def _checked(scores: np.ndarray, options: ScorerOptions, name: str, texts: list[str]) -> np.ndarray:
    """The scores; raises UserError for one outside the range that the recipe states."""
    low, high = options.range or (-np.inf, np.inf)
    outside = np.flatnonzero((scores < low) | (scores > high))
    if options.indicator is None and len(outside):
        raise UserError(
            f"scorer of {name}: {scores[outside[0]]:g} for {len(outside)} responses, e.g. "
            f"{texts[outside[0]][:60]!r}, is outside its range [{low:g}, {high:g}]; state the "
            "range that its scores have"
        )
    return scores


def score_texts(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    responses: list[str],
    *,
    options: ScorerOptions,
    name: str,
    cache: ScoreCache,
) -> np.ndarray:
    """Scores of (prompt, response) texts after `options`, (num_texts,) float64, higher is better;
    each distinct text is scored once, ever.

    Raises UserError naming the objective and the response where a score is not a finite number.
    """

    def compute(rows: list[int]) -> Iterator[Scored]:
        return scorer.batches([prompts[i] for i in rows], [responses[i] for i in rows])

    raw = _scored_once(scorer, prompts, responses, compute, responses, name, cache)
    return _checked(apply_options(raw, options), options, name, responses)


def score_tokens(
    scorer: TokenScorer,
    prompts: list[list[int]],
    responses: list[list[int]],
    *,
    texts: list[str],
    ref_logp: np.ndarray | None,
    options: ScorerOptions,
    name: str,
    cache: ScoreCache,
) -> np.ndarray:
    """As `score_texts`, by token ids, which are also the cache's key; texts: the responses' texts,
    for messages."""

    def compute(rows: list[int]) -> Iterator[Scored]:
        for begin in range(0, len(rows), TEXTS_PER_CALL):
            batch = rows[begin : begin + TEXTS_PER_CALL]
            logps = None if ref_logp is None else np.asarray(ref_logp, dtype=np.float64)[batch]
            tokens = [prompts[i] for i in batch], [responses[i] for i in batch]
            positions = list(range(begin, begin + len(batch)))
            yield positions, scorer.score_tokens(*tokens, logps)

    raw = _scored_once(scorer, prompts, responses, compute, texts, name, cache)
    return _checked(apply_options(raw, options), options, name, texts)


def _scored_once(
    scorer: Scorer,
    prompts: Sequence,
    responses: list,
    compute: Callable[[list[int]], Iterator[Scored]],
    texts: list[str],
    name: str,
    cache: ScoreCache,
) -> np.ndarray:
    """Raw scores of all rows, (num_rows,); `compute` is asked for those rows alone that neither the
    cache nor an equal row has, and what it has scored so far is kept at once."""
    keys = [
        hashlib.sha256(json.dumps([scorer.fingerprint, p, r]).encode()).digest()
        for p, r in zip(prompts, responses, strict=True)
    ]
    kept = cache.get(list(dict.fromkeys(keys)))
    todo = {key: i for i, key in enumerate(keys) if key not in kept}
    waiting, rows = list(todo), list(todo.values())
    for positions, scores in compute(rows):
        fresh = np.asarray(scores, dtype=np.float64)
        finite = np.isfinite(fresh)
        new = {
            waiting[p]: float(score)
            for p, score, ok in zip(positions, fresh, finite, strict=True)
            if ok
        }
        cache.put(new)
        kept.update(new)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            text = texts[rows[positions[bad[0]]]][:60]
            raise UserError(
                f"scorer of {name}: {fresh[bad[0]]} for {len(bad)} responses, e.g. {text!r}; "
                "scores must be finite"
            )
    return np.array([kept[key] for key in keys])
