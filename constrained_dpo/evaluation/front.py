"""`cdpo front`: the trade-off of a conditional run. Each point is a member of its family: the one
that meets a margin, or the one at a given λ and κ; sampled afresh and judged.

RUN/front/front.json lists the points. The list is written before they are played: a point's place
in it is its look at the test prompts, which its verdict pays for (`verdict.front_confidence`).
"""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from constrained_dpo.evaluation.front_points import play_point
from constrained_dpo.evaluation.front_record import Front, FrontPoint, Setting
from constrained_dpo.evaluation.front_source import FrontOptions, FrontSource
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.problem import by_name
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.multipliers import demanded
from constrained_dpo.run.record import RoundRecord
from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.readers.tables import read_parquet

DEFAULT_SHARES = (1.0, 0.9, 1.1, 0.75, 1.25, 0.5, 1.5, 0.25, 0.0)
"""Of the recipe's margins: the points of a front where none are named, in the order of their looks.
Trials near the recipe's are there already, and tell where the next ones are searched."""

Values = Mapping[str, float | Sequence[float]]
"""One value or several, by constraint."""


def require_family(run: RunDirectory, recipe: Recipe) -> int:
    """Give the last round done; raises UserError where the run has no family."""
    if recipe.fit.conditional is None:
        raise UserError(
            f"{run.path}: has no family (fit.conditional is null), so its policy meets one margin; "
            "start a run with fit.conditional={} and dual.method=solve"
        )
    if not run.rounds_done():
        raise UserError(f"{run.path}: no round has been played yet; `cdpo run {run.path}` does")
    return run.rounds_done() - 1


def settings_of(
    run: RunDirectory,
    recipe: Recipe,
    margins: Values | None = None,
    lambdas: Values | None = None,
    kappas: Sequence[float] | None = None,
) -> list[Setting]:
    """List the points of a front: every combination of the values, each at every κ.

    margins: by constraint, thresholds where the recipe has one; the constraints that are not named
    stay at the recipe's. lambdas: multipliers to take as they are; the others stay at the run's
    last ones, and so do all of them where κ alone is given. Nothing at all: the recipe's margins
    times 0 to 1.5. Raises UserError for unknown names and values that cannot be.
    """
    number = require_family(run, recipe)
    record = RoundRecord.read(run.round_file(number))
    for kappa in kappas or ():
        if not (np.isfinite(kappa) and kappa > 0):
            raise UserError(f"kappa is {kappa:g}; give finite numbers > 0, such as 0.5")
    solved = _combinations(margins or {}, by_name(recipe.problem.bounds), "margin")
    given = _combinations(lambdas or {}, record.policy_lambda, "lambda")
    if not margins and not lambdas and not kappas:
        solved = _default_margins(run, recipe)
    elif not margins:
        solved = []
    if not lambdas and (margins or not kappas):
        given = []
    given = [by_name(recipe.problem.multipliers(values)) for values in given]
    free: list[float | None] = [None if recipe.objective.kl_budget is not None else 1.0]
    points = [
        Setting(margins=values, kappa=kappa) for values, kappa in product(solved, kappas or free)
    ]
    points += [
        Setting(lambda_=values, kappa=kappa)
        for values, kappa in product(given, kappas or [record.kappa])
    ]
    return list({point.key(): point for point in points}.values())


def _combinations(values: Values, others: Mapping[str, float], what: str) -> list[dict[str, float]]:
    """Every combination of the values, with `others` where a constraint is not named."""
    for name, numbers in values.items():
        if name not in others:
            raise UserError(
                f"{what} of {name}: no constraint has this name; the constraints are "
                f"{', '.join(others) or '(none)'}"
            )
        if not np.isfinite(numbers).all() or not np.size(numbers):
            raise UserError(f"{what} of {name}: {numbers}; give finite numbers")
    grids = [
        [_rounded(value) for value in np.atleast_1d(values[name])] if name in values else [other]
        for name, other in others.items()
    ]
    return [dict(zip(others, combination, strict=True)) for combination in product(*grids)]


def _rounded(value: float) -> float:
    """A number as it was meant: a grid's 0.30000000000000004 is the point 0.3."""
    return float(f"{value:.12g}")


def _default_margins(run: RunDirectory, recipe: Recipe) -> list[dict[str, float]]:
    """The recipe's margins times 0 to 1.5; a margin of about 0 counts as a tenth of std(g), and a
    threshold goes from π_ref's mean on."""
    problem = recipe.problem
    if not problem.names:
        raise UserError("the recipe has no constraint; give --kappa, such as --kappa 0.5,1,1.5")
    reference = read_parquet(run.reference_file)
    dual = reference[reference["split"] == "dual"]
    means = problem.reference_scores(dual).groupby("prompt_id")[problem.names].mean().mean()
    needed, rise = demanded(run, recipe)[0], problem.levels(means) - means
    full, zero = needed.where(rise >= 0, -needed), means.where(~problem.relative, 0.0)
    return [
        {name: _rounded(zero[name] + share * full[name]) for name in problem.names}
        for share in DEFAULT_SHARES
    ]


def stored_points(
    run: RunDirectory, recipe: Recipe, settings: Sequence[Setting], options: FrontOptions
) -> list[FrontPoint] | None:
    """Read the settings' points; None where one of them is not played yet."""
    source = FrontSource(run, recipe, require_family(run, recipe), options)
    files = [run.front_folder(source.key(setting)) / "point.json" for setting in settings]
    if not all(file.exists() for file in files):
        return None
    return [FrontPoint.read(file) for file in files]


def play_points(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    settings: Sequence[Setting],
    options: FrontOptions,
) -> list[FrontPoint]:
    """Play the settings' points that are not stored yet, and give all of them.

    The run must be held. Killed at any moment, the same call goes on: each point keeps its look.
    """
    source = FrontSource(run, recipe, require_family(run, recipe), options)
    keys = [source.key(setting) for setting in settings]
    looks = _looks(run)
    looks += [key for key in dict.fromkeys(keys) if key not in looks]
    _write_front(source, looks)
    points = []
    for setting, key in zip(settings, keys, strict=True):
        file = run.front_folder(key) / "point.json"
        if not file.exists():
            look = looks.index(key) + 1
            play_point(source, learner, setting, look, _done(run, looks[: look - 1]))
            _write_front(source, looks)
        points.append(FrontPoint.read(file))
    return points


def play_front(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    points: Sequence[Setting],
    options: FrontOptions,
) -> Front:
    """Play the points that are not stored yet; give the run's front with all that it has.

    The run must be held. Raises UserError where the run has no family.
    """
    play_points(run, recipe, learner, points, options)
    return read_front(run)


def read_front(run: RunDirectory) -> Front:
    """Read front.json; raises UserError where there is none."""
    if not run.front_file.exists():
        raise UserError(f"{run.path}: has no front yet; `cdpo front {run.path}` plays one")
    return Front.read(run.front_file)


def _looks(run: RunDirectory) -> list[str]:
    return list(read_front(run).looks) if run.front_file.exists() else []


def _done(run: RunDirectory, keys: Sequence[str]) -> list[FrontPoint]:
    files = [run.front_folder(key) / "point.json" for key in keys]
    return [FrontPoint.read(file) for file in files if file.exists()]


def _write_front(source: FrontSource, looks: list[str]) -> None:
    """Replace front.json by what is stored now."""
    run, problem, law = source.run, source.recipe.problem, source.law
    front = Front(
        reward=problem.reward,
        confidence=source.recipe.dual.confidence,
        round=source.number,
        levels=by_name(problem.bounds),
        low=by_name(law.low),
        high=by_name(law.high),
        reference=source.means(),
        looks=looks,
        points=[point.row(problem) for point in _done(run, looks)],
    )
    write_json(run.front_file, front.to_json())
