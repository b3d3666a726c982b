"""Constrained alignment of language models: as helpful as possible, at least this much safer.

The names below are the documented API (docs/reference.md, docs/python-api.md). They are loaded when
first used, so `import constrained_dpo` is instant and imports no network library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from constrained_dpo.api import Run
    from constrained_dpo.check.check import CheckReport, check_recipe
    from constrained_dpo.dual.one_shot import OneShotSolution, solve_one_shot
    from constrained_dpo.dual.scores import ScoreTable
    from constrained_dpo.dual.steps import dual_step
    from constrained_dpo.estimates.slack import estimate_subgradient
    from constrained_dpo.evaluation.evaluate import EvaluationOptions, JudgeOptions
    from constrained_dpo.evaluation.record import Evaluation
    from constrained_dpo.gate.gate import GateOptions
    from constrained_dpo.gate.record import GateRecord
    from constrained_dpo.problem import ConstrainedProblem, Constraint
    from constrained_dpo.recipe.load import load_recipe
    from constrained_dpo.recipe.schema import Recipe
    from constrained_dpo.run.record import RoundRecord
    from constrained_dpo.run.status import RunStatus
    from data_prep.errors import UserError

_PLACES = {
    "CheckReport": "constrained_dpo.check.check",
    "ConstrainedProblem": "constrained_dpo.problem",
    "Constraint": "constrained_dpo.problem",
    "Evaluation": "constrained_dpo.evaluation.record",
    "EvaluationOptions": "constrained_dpo.evaluation.evaluate",
    "GateOptions": "constrained_dpo.gate.gate",
    "GateRecord": "constrained_dpo.gate.record",
    "JudgeOptions": "constrained_dpo.evaluation.evaluate",
    "OneShotSolution": "constrained_dpo.dual.one_shot",
    "Recipe": "constrained_dpo.recipe.schema",
    "RoundRecord": "constrained_dpo.run.record",
    "Run": "constrained_dpo.api",
    "RunStatus": "constrained_dpo.run.status",
    "ScoreTable": "constrained_dpo.dual.scores",
    "UserError": "data_prep.errors",
    "check_recipe": "constrained_dpo.check.check",
    "dual_step": "constrained_dpo.dual.steps",
    "estimate_subgradient": "constrained_dpo.estimates.slack",
    "load_recipe": "constrained_dpo.recipe.load",
    "solve_one_shot": "constrained_dpo.dual.one_shot",
}

__all__ = [
    "CheckReport",
    "ConstrainedProblem",
    "Constraint",
    "Evaluation",
    "EvaluationOptions",
    "GateOptions",
    "GateRecord",
    "JudgeOptions",
    "OneShotSolution",
    "Recipe",
    "RoundRecord",
    "Run",
    "RunStatus",
    "ScoreTable",
    "UserError",
    "check_recipe",
    "dual_step",
    "estimate_subgradient",
    "load_recipe",
    "solve_one_shot",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
