"""`cdpo sweep`: one recipe under many margins, methods and seeds. Each run is an ordinary folder;
those of a seed share a prepared pool.

Everything is decided by what is asked and by the files that are there, so the same command goes on
where a killed one stopped.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.learners.protocol import Learner
from constrained_dpo.progress import Announce, silent
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import WEIGHTED_SUM, method_overrides, uses_margins
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.rounds import play_round
from constrained_dpo.run.steering import reason_to_stop
from data_prep.errors import UserError
from data_prep.tables import read_table

Prepare = Callable[[RunDirectory], tuple[Recipe, Learner]]
"""Opens a run: its recipe and learner, prepared now where it is not yet."""


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


def plan_sweep(
    recipe_file: Path,
    output: Path,
    *,
    overrides: list[str],
    methods: list[str],
    margins: list[dict[str, float]],
    weights: list[dict[str, float]],
    seeds: list[int],
) -> list[Planned]:
    """The runs in the order they are played: for every seed and method one run per setting of the
    margins; methods whose λ is fixed beforehand look at no margin and get one run per seed, a
    weighted sum one per setting of the weights.

    margins, weights: settings by constraint; constraints that a setting does not name keep the
    recipe's. Raises UserError for methods, constraints, weights and recipes that do not fit, before
    anything is played.
    """
    recipe = load_recipe(recipe_file, overrides)
    relative = {c.name: c.margin is not None for c in recipe.objective.constraints}
    for name in dict.fromkeys(name for setting in margins for name in setting):
        if name not in relative:
            raise UserError(
                f"margin of {name}: the recipe's constraints are {', '.join(relative) or '(none)'}"
            )
        if not relative[name]:
            raise UserError(
                f"margin of {name}: the recipe gives it a threshold; -s "
                f"objective.constraints.{name}.threshold=C sets another"
            )
    if (WEIGHTED_SUM in methods) != bool(weights):
        raise UserError(
            f"--method {WEIGHTED_SUM} and --weights NAME=VALUE,… belong together: give both or "
            "neither"
        )
    for what, values in (
        ("--method", methods),
        ("--seeds", seeds),
        ("margins", margins),
        ("weights", weights),
    ):
        if len({str(v) for v in values}) < len(values):
            raise UserError(f"{what}: a value is given twice")
    planned = []
    for seed in seeds:
        for method in methods:
            settings = (
                margins if uses_margins(method) else weights if method == WEIGHTED_SUM else [{}]
            )
            for setting in settings:
                changed = method_overrides(method, recipe, setting)
                if uses_margins(method):
                    changed += [
                        f"objective.constraints.{name}.margin={value!r}"
                        for name, value in setting.items()
                    ]
                label = recipe.name if method == "recipe" else method
                name = "-".join(
                    [_folder(label), *(f"{n}{v:g}" for n, v in setting.items()), f"seed{seed}"]
                )
                own = [f"seed={seed}"]
                planned.append(
                    Planned(
                        output / name,
                        output / "pools" / f"seed{seed}",
                        [*overrides, *changed, *own],
                        [*overrides, *own],
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


def play_sweep(
    recipe_file: Path,
    planned: list[Planned],
    prepare: Prepare,
    say: Callable[[str], None],
    announce: Announce = silent,
) -> None:
    """Prepares each seed's pool once and plays every run to its end; what is there already is left
    as it is.

    Raises UserError where a folder holds a run of another recipe.
    """
    for number, item in enumerate(planned, 1):
        if not RunDirectory(item.path).state_file.exists():
            pool = init_run(recipe_file, item.pool, item.pool_overrides)
            with pool.locked():
                if not pool.state()["lambda"]:
                    say(f"{item.pool}: preparing the pool that the runs of this seed share")
                    prepare(pool)
        run = init_run(recipe_file, item.path, item.overrides, RunDirectory(item.pool))
        if is_finished(run):
            say(f"{number} of {len(planned)}: {item.path} is done already")
            continue
        say(f"{number} of {len(planned)}: {item.path}")
        with run.locked():
            recipe, learner = prepare(run)
            while not is_finished(run):
                play_round(run, recipe, learner, announce)
