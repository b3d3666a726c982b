"""`Run`: a run from Python. The commands of `cdpo` do the same with the same functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, overload

from constrained_dpo.check.history import History, check_history
from constrained_dpo.evaluation.evaluate import Evaluated, EvaluationOptions, evaluate
from constrained_dpo.evaluation.export import export_adapter, export_merged, require_free
from constrained_dpo.evaluation.export_members import Member, export_members, varied_constraints
from constrained_dpo.evaluation.front import (
    Values,
    play_points,
    read_front,
    settings_of,
    stored_points,
)
from constrained_dpo.evaluation.front_record import Front, FrontPoint, Setting
from constrained_dpo.evaluation.front_source import FrontOptions
from constrained_dpo.evaluation.record import Evaluation
from constrained_dpo.gate.gate import GateOptions, gate
from constrained_dpo.gate.record import GateRecord
from constrained_dpo.gate.settings import GateSource, load_gate
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.recipe.load import RecipeSource
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.report.front_page import write_front
from constrained_dpo.report.run_page import write_report
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.play import Played, held, open_prepared, play
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.status import RunStatus, read_status
from constrained_dpo.run.steering import chosen_round


class Run:
    """A run directory, and what can be done with it.

    Rounds are resumable: what a killed call left is used by the next one. The models stay loaded
    between calls that play; `evaluate` and `export` load their own. Progress goes through
    `logging` (loggers `constrained_dpo` and `data_prep`). Methods raise UserError, a ValueError,
    for a user's mistake: the message says where and what to do.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = RunDirectory(Path(path))
        self._opened: tuple[Recipe, Learner] | None = None

    @classmethod
    def create(
        cls,
        recipe: RecipeSource,
        path: str | Path,
        overrides: list[str] | None = None,
        source: "Run | None" = None,
    ) -> Self:
        """Freeze a recipe (a file, a dict or a `Recipe`) into a new run directory.

        overrides: KEY=VALUE with dotted keys, e.g. `objective.beta=0.1`; source: a prepared run
        whose reference samples and scores are used again. The same recipe again is no error; the
        run that is there goes on.
        """
        init_run(recipe, Path(path), overrides or [], None if source is None else source.directory)
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run directory. Raises UserError where there is none."""
        run = cls(path)
        run.directory.state()
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def recipe(self) -> Recipe:
        """The frozen recipe, with what `prepare` measured."""
        return self.directory.recipe()

    def _open(self, directory: RunDirectory) -> tuple[Recipe, Learner]:
        if self._opened is None:
            self._opened = open_prepared(directory)
        return self._opened

    def prepare(self) -> dict[str, float]:
        """Sample and score the reference policy; return the first multipliers. Nothing is done
        twice."""
        with held(self.directory):
            self._open(self.directory)
        return self.directory.state().lambda_[0]

    def round(self) -> RoundRecord:
        """Play one dual iteration, after `prepare` where it was not done: relabel, fit, re-score,
        dual step."""
        return self.play(1, forced=True).records[0]

    def play(
        self, rounds: int | None = None, *, until_converged: bool = False, forced: bool = False
    ) -> Played:
        """Play more rounds (None: all that the recipe's dual.rounds leaves).

        Stops earlier where the margins turn out to be out of reach, or where the run has converged
        (`until_converged`); `forced`: not before the first one.
        """
        return play(
            self.directory,
            rounds,
            until_converged=until_converged,
            forced=forced,
            opener=self._open,
        )

    def status(self) -> RunStatus:
        """Read where the run stands and what happens next."""
        return read_status(self.directory)

    def record(self, round: int | str = "last") -> RoundRecord:
        """Read a round's record; round: its number, best, best-dual or last."""
        return RoundRecord.read(self.directory.round_file(self._number(round)))

    def verdict(self, round: int | str = "last") -> str:
        """Say whether a round's policy meets all constraints on the test prompts: satisfied,
        violated or undecided."""
        return self.record(round).verdict

    def _number(self, round: int | str) -> int:
        return chosen_round(self.directory, str(round))

    def report(self, round: int | str = "last") -> Path:
        """Write the HTML page with its figures; return its path."""
        return write_report(self.directory, self._number(round))[0]

    def evaluate(self, options: EvaluationOptions | None = None) -> Evaluated:
        """Sample a policy afresh on unseen prompts and judge it; None: the last round's, on the
        test prompts."""
        self._opened = None
        return evaluate(self.directory, options or EvaluationOptions())

    def gate(self, settings: GateSource, options: GateOptions | None = None) -> GateRecord:
        """Judge a policy by a gate (a file, a dict or its settings) before it is released; None:
        the last round's.

        The record's verdict is passed, failed or undecided; a gate that was decided is not played
        again.
        """
        self._opened = None
        return gate(self.directory, load_gate(settings), options or GateOptions())

    @overload
    def export(
        self, output: str | Path, round: int | str = "last", *, merge: bool = False
    ) -> Evaluation | None: ...

    @overload
    def export(
        self,
        output: str | Path,
        *,
        margins: Values | None = None,
        lambda_: Values | None = None,
        kappa: float | Sequence[float] | None = None,
    ) -> list[Member]: ...

    def export(
        self,
        output: str | Path,
        round: int | str = "last",
        *,
        merge: bool = False,
        margins: Values | None = None,
        lambda_: Values | None = None,
        kappa: float | Sequence[float] | None = None,
    ) -> Evaluation | list[Member] | None:
        """Write a round's adapter, or members of the last round's family, with a model card to a
        new folder.

        merge: the whole model instead, merged into the unquantized base and measured again; that
        measurement is returned. margins, lambda_, kappa: as in `front`, one value each or several:
        ordinary adapters, each sampled afresh and judged as a point of the front; several lie in
        folders of `output`. Raises UserError where the output holds something already.
        """
        if margins or lambda_ or kappa is not None:
            kappas = [kappa] if isinstance(kappa, float | int) else kappa
            settings = settings_of(self.directory, self.recipe, margins, lambda_, kappas)
            return self._export_members(Path(output), settings)
        number = self._number(round)
        if not merge:
            export_adapter(self.directory, self.recipe, number, Path(output))
            return None
        self._opened = None
        with self.directory.locked():
            return export_merged(self.directory, self.recipe, number, Path(output))

    def _export_members(self, output: Path, settings: Sequence[Setting]) -> list[Member]:
        require_free(output)  # before the sampling, not after
        recipe, points = self.recipe, self._points(settings, FrontOptions())
        varied = varied_constraints(recipe, settings)
        return export_members(self.directory, recipe, points, varied, output)

    def front(
        self,
        margins: Values | None = None,
        lambdas: Values | None = None,
        kappas: Sequence[float] | None = None,
        options: FrontOptions | None = None,
    ) -> Front:
        """Play the trade-off of a conditional run: for each margin the λ that meets it, what that
        policy does on the test prompts, and its verdict; write its page and figure.

        margins: values by constraint, e.g. {"harmless": [0, 0.5, 1]} (None: the recipe's times 0 to
        1.5); lambdas: multipliers to take as they are; kappas: how far from π_ref at all. Every
        combination is a point; constraints that are not named stay at the recipe's margin, or at
        the run's λ. Points that are stored are not played again.
        """
        settings = settings_of(self.directory, self.recipe, margins, lambdas, kappas)
        self._points(settings, options or FrontOptions())
        front = read_front(self.directory)
        write_front(self.directory, front)
        return front

    def _points(self, settings: Sequence[Setting], options: FrontOptions) -> list[FrontPoint]:
        """The points of these settings, played where they are not stored."""
        stored = stored_points(self.directory, self.recipe, settings, options)
        if stored is not None:
            return stored
        with held(self.directory):
            return play_points(self.directory, *self._open(self.directory), settings, options)

    def check(self) -> History:
        """Recompute the multipliers of all rounds from the run's tables; raise UserError where a
        stored one differs."""
        return check_history(self.directory)
