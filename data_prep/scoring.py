"""Scorers: real-valued judgements of (prompt, response) texts, and what a recipe makes of their scores; nothing is scored twice."""

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from data_prep.score_cache import ScoreCache
from data_prep.scorer_settings import (
    BeaverScorerSettings,
    ColumnScorerSettings,
    GuardScorerSettings,
    HttpScorerSettings,
    ImplicitScorerSettings,
    PythonScorerSettings,
    ScorerOptions,
    ScorerSettings,
)
from data_prep.settings import UserError
from data_prep.tables import hash_file, read_table, require_columns, require_finite

if TYPE_CHECKING:
    from data_prep.implicit import AskedPolicy

TEXTS_PER_CALL = 4096
"""So many texts are scored between two writes to the cache: what a kill costs at most, and still many batches of any model."""

Scored = tuple[list[int], np.ndarray]  # positions, and their scores


class Scorer(Protocol):
    """Scores texts. `fingerprint` identifies everything a score depends on; `score` returns (num_texts,) floats."""

    fingerprint: str

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray: ...


class TokenScorer(Scorer, Protocol):
    """A scorer that judges the sampled token ids themselves; where they are known, they are what it is given.

    ref_logp: log-probabilities of the responses under `reference_fingerprint`'s policy (nats, (num_responses,), NaN where unknown), or
    None: then it computes them.
    """

    reference_fingerprint: str

    def score_tokens(self, prompts: list[list[int]], responses: list[list[int]], ref_logp: np.ndarray | None) -> np.ndarray: ...


class PythonScorer:
    """Calls a named function; its file's content is its fingerprint."""

    def __init__(self, settings: PythonScorerSettings) -> None:
        self.target = settings.target
        module_name, _, function = settings.target.rpartition(":")
        if not module_name:
            raise UserError(f"scorer target {settings.target!r}: write file.py:function or package.module:function")
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
        self.function = getattr(module, function, None)
        if not callable(self.function):
            own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise UserError(
                f"scorer target {settings.target}: {module_name} has no function {function} (it has {', '.join(own) or 'none'})"
            )
        self.fingerprint = f"python:{function}:{hash_file(Path(module.__file__))[:16]}"

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        try:
            values = self.function(prompts, responses)
        except (Exception, SystemExit) as error:
            raise UserError(f"scorer {self.target} raised {type(error).__name__}: {_one_line(error)}") from error
        try:
            scores = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(f"scorer {self.target} did not return numbers ({_one_line(error)}); return one float per response") from error
        if scores.shape != (len(responses),):
            raise UserError(f"scorer {self.target} returned shape {scores.shape} for {len(responses)} responses; one float each")
        return scores


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"scorer target: {path}: no such file")
    name = f"_cdpo_scorer_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"scorer target: {path} cannot be imported ({type(error).__name__}: {_one_line(error)})") from error
    return module


def _import_module(name: str) -> object:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"scorer target: module {name} cannot be imported ({type(error).__name__}: {_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class ColumnScorer:
    """Looks scores up by (prompt, response); raises UserError for a text the table does not hold."""

    def __init__(self, settings: ColumnScorerSettings) -> None:
        self.settings = settings
        table = read_table(Path(settings.file))
        require_columns(table, ["prompt", "response", settings.column], settings.file)
        require_finite(table, [settings.column], settings.file)
        table = table.astype({"prompt": str, "response": str})  # a csv of numbers is read as numbers
        self.scores = table.drop_duplicates(["prompt", "response"]).set_index(["prompt", "response"])[settings.column]
        self.fingerprint = f"column:{settings.column}:{hash_file(Path(settings.file))[:16]}"

    def score(self, prompts: list[str], responses: list[str]) -> np.ndarray:
        found = self.scores.reindex(pd.MultiIndex.from_arrays([prompts, responses])).to_numpy(np.float64)
        missing = np.flatnonzero(np.isnan(found))
        if len(missing):
            raise UserError(
                f"{self.settings.file}: no row for {len(missing)} of {len(found)} responses, e.g. {responses[missing[0]][:40]!r}; "
                "a column scorer cannot score new responses"
            )
        return found


def make_scorer(settings: ScorerSettings, asked: "AskedPolicy | None" = None) -> Scorer:
    """The scorer that the settings describe (models are loaded at once); asked: the recipe's policy, which implicit scorers need.

    Raises UserError for what cannot be used.
    """
    if isinstance(settings, PythonScorerSettings):
        return PythonScorer(settings)
    if isinstance(settings, ColumnScorerSettings):
        return ColumnScorer(settings)
    if isinstance(settings, BeaverScorerSettings):
        from data_prep.beaver import BeaverScorer

        return BeaverScorer(settings)
    if isinstance(settings, GuardScorerSettings):
        from data_prep.guard import GuardScorer

        return GuardScorer(settings)
    if isinstance(settings, ImplicitScorerSettings):
        from data_prep.implicit import ImplicitScorer

        return ImplicitScorer(settings, asked)
    if isinstance(settings, HttpScorerSettings):
        from data_prep.http_scorer import HttpScorer

        return HttpScorer(settings)
    from data_prep.classifier import ClassifierScorer

    return ClassifierScorer(settings)


def _calls(count: int) -> Iterator[slice]:
    return (slice(begin, begin + TEXTS_PER_CALL) for begin in range(0, count, TEXTS_PER_CALL))


def apply_options(scores: np.ndarray, options: ScorerOptions) -> np.ndarray:
    """What a recipe says of a scorer's raw scores, any shape: negated, then as an indicator 1[score ≥ t] or clipped to [low, high]."""
    scores = -scores if options.negate else scores
    if options.indicator is not None:
        return (scores >= options.indicator).astype(np.float64)
    return scores if options.clip is None else np.clip(scores, *options.clip)


def score_texts(
    scorer: Scorer, prompts: list[str], responses: list[str], *, options: ScorerOptions, name: str, cache: ScoreCache
) -> np.ndarray:
    """Scores of (prompt, response) texts after `options`, (num_texts,) float64, higher is better; each distinct text is scored once, ever.

    Raises UserError naming the objective and the response where a score is not a finite number.
    """

    def compute(rows: list[int]) -> Iterator[Scored]:
        some = [prompts[i] for i in rows], [responses[i] for i in rows]
        if hasattr(scorer, "score_as_they_arrive"):
            yield from scorer.score_as_they_arrive(*some)
            return
        for part in _calls(len(rows)):
            yield list(range(len(rows))[part]), np.asarray(scorer.score(some[0][part], some[1][part]), dtype=np.float64)

    return apply_options(_scored_once(scorer, prompts, responses, compute, responses, name, cache), options)


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
    """As `score_texts`, by token ids, which are also the cache's key; texts: the responses' texts, for messages."""

    def compute(rows: list[int]) -> Iterator[Scored]:
        for part in _calls(len(rows)):
            some = rows[part]
            known = None if ref_logp is None else np.asarray(ref_logp, dtype=np.float64)[some]
            scores = scorer.score_tokens([prompts[i] for i in some], [responses[i] for i in some], known)
            yield list(range(len(rows))[part]), np.asarray(scores, dtype=np.float64)

    return apply_options(_scored_once(scorer, prompts, responses, compute, texts, name, cache), options)


def _scored_once(
    scorer: Scorer,
    prompts: list,
    responses: list,
    compute: Callable[[list[int]], Iterator[Scored]],
    texts: list[str],
    name: str,
    cache: ScoreCache,
) -> np.ndarray:
    """Raw scores of all rows, (num_rows,); `compute` is asked for those rows alone that neither the cache nor an equal row has, and what
    it has scored so far is kept at once."""
    keys = [hashlib.sha256(json.dumps([scorer.fingerprint, p, r]).encode()).digest() for p, r in zip(prompts, responses, strict=True)]
    known = cache.get(list(dict.fromkeys(keys)))
    todo = {key: i for i, key in enumerate(keys) if key not in known}
    waiting, rows = list(todo), list(todo.values())
    for positions, fresh in compute(rows):
        finite = np.isfinite(fresh)
        new = {waiting[p]: float(score) for p, score, ok in zip(positions, fresh, finite, strict=True) if ok}
        cache.put(new)
        known.update(new)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            text = texts[rows[positions[bad[0]]]][:60]
            raise UserError(f"scorer of {name}: {fresh[bad[0]]} for {len(bad)} responses, e.g. {text!r}; scores must be finite")
    return np.array([known[key] for key in keys])
