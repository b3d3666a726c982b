"""`cdpo sweep`: one recipe under many margins, methods and seeds. Each run is an ordinary folder;
those of a seed share a prepared pool.

Everything is decided by what is asked and by the files that are there, so the same command goes on
where a killed one stopped.
"""

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import WEIGHTED_SUM, method_overrides, uses_margins
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.play import Opener, held, open_prepared, play
from constrained_dpo.run.steering import reason_to_stop
from data_prep.errors import UserError
from data_prep.readers.tables import read_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A run of the sweep. pool: the prepared folder of its seed; overrides, pool_overrides: -s
    settings of both."""

    path: Path
    pool: Path
    overrides: list[str]
    pool_overrides: list[str]

    def commands(self, recipe: Path) -> list[str]:
        """The same by hand; a run that should have several processes is played so."""

        def line(path: Path, overrides: list[str], *source: str) -> str:
            return shlex.join(
                [
                    "cdpo",
                    "init",
                    str(recipe),
                    str(path),
                    *(word for value in overrides for word in ("-s", value)),
                    *source,
                ]
            )

        return [
            f"{line(self.pool, self.pool_overrides)} && "
            f"{shlex.join(['cdpo', 'prepare', str(self.pool)])}",
            f"{line(self.path, self.overrides, '--from', str(self.pool))} && "
            f"{shlex.join(['cdpo', 'run', str(self.path)])}",
        ]


@dataclass(frozen=True)
class SweepGrid:
    """What is played: every method and seed, margins and weights as settings by constraint.

    Constraints that a setting does not name keep the recipe's value.
    """

    methods: list[str]
    seeds: list[int]
    margins: list[dict[str, float]]
    weights: list[dict[str, float]]

    def settings(self, method: str) -> list[dict[str, float]]:
        """Give a method's settings: margins where it looks at them, weights for a weighted sum."""
        if uses_margins(method):
            return self.margins
        return self.weights if method == WEIGHTED_SUM else [{}]


def plan_sweep(
    recipe_file: Path, output: Path, overrides: list[str], grid: SweepGrid
) -> list[Planned]:
    """Plan the runs in the order they are played: by seed, method and setting.

    Raises UserError for methods, constraints, weights and recipes that do not fit, before anything
    is played.
    """
    recipe = load_recipe(recipe_file, overrides)
    _check_grid(grid, recipe)
    planned = []
    for seed in grid.seeds:
        for method in grid.methods:
            for setting in grid.settings(method):
                changed = method_overrides(method, recipe, setting)
                if uses_margins(method):
                    changed += [
                        f"objective.constraints.{name}.margin={value!r}"
                        for name, value in setting.items()
                    ]
                label = recipe.name if method == "recipe" else method
                numbers = (f"{name}{value:g}" for name, value in setting.items())
                planned.append(
                    Planned(
                        output / "-".join([_folder(label), *numbers, f"seed{seed}"]),
                        output / "pools" / f"seed{seed}",
                        [*overrides, *changed, f"seed={seed}"],
                        [*overrides, f"seed={seed}"],
                    )
                )
    for run in planned:
        # all that is wrong is said before hours are spent
        load_recipe(recipe_file, run.overrides)
    if len({run.path for run in planned}) < len(planned):
        raise UserError(
            "two runs of the sweep would have the same folder: margins and weights must differ "
            "within 6 digits"
        )
    return planned


def _check_grid(grid: SweepGrid, recipe: Recipe) -> None:
    relative = {c.name: c.margin is not None for c in recipe.objective.constraints}
    for name in dict.fromkeys(name for setting in grid.margins for name in setting):
        if name not in relative:
            raise UserError(
                f"margin of {name}: the recipe's constraints are {', '.join(relative) or '(none)'}"
            )
        if not relative[name]:
            raise UserError(
                f"margin of {name}: the recipe gives it a threshold; -s "
                f"objective.constraints.{name}.threshold=C sets another"
            )
    if (WEIGHTED_SUM in grid.methods) != bool(grid.weights):
        raise UserError(
            f"--method {WEIGHTED_SUM} and --weights NAME=VALUE,… belong together: give both or "
            "neither"
        )
    for option, values in {
        "--method": list(map(str, grid.methods)),
        "--seeds": list(map(str, grid.seeds)),
        "margins": list(map(str, grid.margins)),
        "weights": list(map(str, grid.weights)),
    }.items():
        if len(set(values)) < len(values):
            raise UserError(f"{option}: a value is given twice")


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in name).strip(".") or "recipe"


def read_pairs(path: Path) -> list[dict[str, float]]:
    """Settings of the margins from a table with one column per constraint, a row each; raises
    UserError naming the row."""
    table = read_table(path)
    settings = []
    for number, row in enumerate(table.to_dict("records"), 1):
        values = {str(name): pd.to_numeric(value, errors="coerce") for name, value in row.items()}
        for name, value in values.items():
            if not pd.notna(value):
                raise UserError(f"{path}: row {number}: {name} is {row[name]!r}, not a number")
        settings.append({name: float(value) for name, value in values.items()})
    if not settings:
        raise UserError(
            f"{path}: holds no row; write one column per constraint and a row per setting of the "
            "margins"
        )
    return settings


def is_finished(run: RunDirectory) -> bool:
    """Whether `play_sweep` leaves a run alone: all rounds of its recipe are done, or no λ can meet
    its constraints."""
    done = run.rounds_done()
    return done >= run.recipe().dual.rounds or (
        done > 0 and reason_to_stop(run, run.recipe(), False) is not None
    )


def play_sweep(recipe_file: Path, planned: list[Planned], opener: Opener = open_prepared) -> None:
    """Prepare each seed's pool once and play every run to its end; leave what is there already.

    Raises UserError where a folder holds a run of another recipe.
    """
    for number, item in enumerate(planned, 1):
        if not RunDirectory(item.path).state_file.exists():
            pool = init_run(recipe_file, item.pool, item.pool_overrides)
            with held(pool):
                if not pool.state().prepared:
                    log.info("%s: preparing the pool that the runs of this seed share", item.pool)
                    opener(pool)
        run = init_run(recipe_file, item.path, item.overrides, RunDirectory(item.pool))
        progress = f"{number} of {len(planned)}: {item.path}"
        if is_finished(run):
            log.info("%s is done already", progress)
            continue
        log.info("%s", progress)
        play(run, opener=opener)
