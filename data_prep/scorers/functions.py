"""Scorers without a model: a function of the user's, and a column of a table."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.files import hash_file
from data_prep.prompts.messages import Prompt, last_user_text, read_prompt
from data_prep.readers.rows import refuse_problems
from data_prep.readers.tables import read_table
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import ColumnScorerSettings, PythonScorerSettings
from data_prep.tables import require_columns, require_finite


class PythonScorer(Scorer):
    """Calls a named function; its file's content is its fingerprint."""

    def __init__(self, settings: PythonScorerSettings) -> None:
        self.target = settings.target
        module_name, _, function = settings.target.rpartition(":")
        if not module_name:
            raise UserError(
                f"scorer target {settings.target!r}: write file.py:function or "
                "package.module:function"
            )
        module = (
            _import_file(Path(module_name))
            if module_name.endswith(".py")
            else _import_module(module_name)
        )
        self.function: Any = getattr(module, function, None)
        if not callable(self.function):
            public = {n: v for n, v in vars(module).items() if not n.startswith("_")}
            functions = [name for name, value in public.items() if callable(value)]
            raise UserError(
                f"scorer target {settings.target}: {module_name} has no function {function} (it "
                f"has {', '.join(functions) or 'none'})"
            )
        self.fingerprint = f"python:{function}:{hash_file(Path(module.__file__ or ''))[:16]}"

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        try:
            values = self.function(prompts, responses)
        except (Exception, SystemExit) as error:
            raise UserError(
                f"scorer {self.target} raised {type(error).__name__}: {_one_line(error)}"
            ) from error
        try:
            scores = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"scorer {self.target} did not return numbers ({_one_line(error)}); return one "
                "float per response"
            ) from error
        if scores.shape != (len(responses),):
            raise UserError(
                f"scorer {self.target} returned shape {scores.shape} for {len(responses)} "
                "responses; one float each"
            )
        return scores


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"scorer target: {path}: no such file")
    name = f"_cdpo_scorer_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"scorer target: {path} cannot be imported; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"scorer target: {path} cannot be imported ({type(error).__name__}: {_one_line(error)})"
        ) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"scorer target: module {name} cannot be imported ({type(error).__name__}: "
            f"{_one_line(error)})"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def table_prompts(table: pd.DataFrame, where: str) -> list[Prompt]:
    """The prompts of a table, texts or messages; raises UserError naming the rows that hold
    neither."""
    prompts, problems = list[Prompt](), list[str]()
    for number, value in enumerate(table["prompt"].astype(object), 1):
        try:
            prompts.append(read_prompt(value))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    refuse_problems(where, problems)
    return prompts


class ColumnScorer(Scorer):
    """Looks scores up by (prompt, response); raises UserError for a text the table does not
    hold."""

    def __init__(self, settings: ColumnScorerSettings) -> None:
        self.settings = settings
        table = read_table(Path(settings.file), texts=["response"])
        require_columns(table, ["prompt", "response", settings.column], settings.file)
        require_finite(table, [settings.column], settings.file)
        table["prompt"] = [last_user_text(prompt) for prompt in table_prompts(table, settings.file)]
        self.scores = table.drop_duplicates(["prompt", "response"]).set_index(
            ["prompt", "response"]
        )[settings.column]
        self.fingerprint = f"column:{settings.column}:{hash_file(Path(settings.file))[:16]}"

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        values = self.scores.reindex(
            pd.MultiIndex.from_arrays([list(prompts), responses])
        ).to_numpy(np.float64)
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            raise UserError(
                f"{self.settings.file}: no row for {len(missing)} of {len(values)} responses, e.g. "
                f"{responses[missing[0]][:40]!r}; "
                "a column scorer cannot score new responses"
            )
        return values
