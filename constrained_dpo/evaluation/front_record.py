"""The records of a front: what a point is, what it shows, and the list of them (front.json)."""

import hashlib
import json
import re

from pydantic import Field

from constrained_dpo.dual.exact import ExactPolicy
from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.problem import ConstrainedProblem
from data_prep.records import Record


class Setting(Record):
    """What a point of a front is; dicts are by constraint.

    margins: the levels that λ is solved for, each a margin over π_ref, or a threshold where the
    recipe has one; None: λ is given as `lambda_`, and is judged at the recipe's levels. kappa: None
    where it is solved for the recipe's KL budget.
    """

    margins: dict[str, float] | None = None
    lambda_: dict[str, float] | None = Field(None, alias="lambda")
    kappa: float | None = 1.0

    def words(self, names: list[str]) -> list[str]:
        """Name the setting by the values of these constraints, and by κ where it is not 1."""
        values = self.margins if self.margins is not None else self.lambda_ or {}
        kind = "" if self.margins is not None else "lambda-"
        words = [f"{kind}{name}-{values[name]:.6g}" for name in names if name in values]
        if self.kappa not in (None, 1.0) or not words:
            words.append(f"kappa-{1.0 if self.kappa is None else self.kappa:.6g}")
        return words

    def name(self, names: list[str]) -> str:
        """Name a folder, or a served adapter, after the setting."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join(self.words(names)))

    def key(self, *identity: object) -> str:
        """Name the point's folder: the setting in words, and a hash of it and of what else its
        numbers depend on."""
        content = json.dumps([self.to_json(), *identity], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.name(list(self.margins or self.lambda_ or {}))[:60]}-{digest}"


class FrontRow(Record):
    """A point of a front in numbers; dicts are by constraint, score units, on the test prompts.

    key: the folder's name; round: whose family it is of; lambda_, kappa: what it is; num_trials:
    how many it took; verdict: on all constraints; reward, utilities, u, `u_ci_*`, `*_se`, verdicts,
    verdict_confidence, cut_off_fraction, mean_length: as in `Measurement`.

    levels: what the constraints are judged at, margins over π_ref or thresholds; solved: whether λ
    was found for them or was given. look: among all points of the run's fronts; outside: at which
    end λ leaves the range that the family was trained on, kappa_outside: κ likewise; at_edge: where
    the root lies beyond the range that was searched. gains: E_π[g] − E_π_ref[g], with the same
    interval's width as u. reward_change: E[r] minus that of the round's own policy, paired by
    prompt, with the difference's standard error. kl (nats) and objective E[r] − β KL at the
    recipe's β, None where the samples are not from the policy itself.
    """

    key: str
    round: int
    solved: bool
    levels: dict[str, float]
    lambda_: dict[str, float] = Field(alias="lambda")
    kappa: float
    look: int
    outside: dict[str, str]
    kappa_outside: str
    at_edge: dict[str, str]
    reward: float
    reward_se: float
    reward_change: float
    reward_change_se: float
    utilities: dict[str, float]
    gains: dict[str, float]
    u: dict[str, float]
    u_ci_low: dict[str, float]
    u_ci_high: dict[str, float]
    kl: float | None
    kl_se: float | None
    objective: float | None
    objective_se: float | None
    verdict: str
    verdicts: dict[str, str]
    verdict_confidence: float
    mean_length: float
    cut_off_fraction: float
    num_trials: int

    def gain_interval(self, name: str) -> tuple[float, float]:
        """Give the two-sided interval of a gain (score units)."""
        shift = self.gains[name] - self.u[name]
        return self.u_ci_low[name] + shift, self.u_ci_high[name] + shift

    @property
    def order(self) -> tuple[bool, float, list[float]]:
        """Sort points: those solved for margins first, then those at a given λ, by κ and value."""
        values = self.levels if self.solved else self.lambda_
        return not self.solved, self.kappa, list(values.values())


class FrontPoint(Record):
    """All that is kept of a point (point.json).

    key: its folder's name; setting: what it was to be; lambda_, kappa: what it is; reason: how its
    search ended, and trials: what it tried, on the dual prompts. dual, test: estimates at the
    setting's levels; reference: π_ref's means on the test prompts, by objective; round, look,
    outside, kappa_outside, at_edge, `reward_change*`: as in `FrontRow`; family: a hash of the gated
    adapter; responses, seed: how many of a prompt were drawn, and how; exact: by split, where every
    response of the world is listed.
    """

    key: str
    setting: Setting
    round: int
    family: str
    responses: int
    seed: int
    look: int
    lambda_: dict[str, float] = Field(alias="lambda")
    kappa: float
    reason: str
    trials: list[Trial]
    outside: dict[str, str]
    kappa_outside: str
    at_edge: dict[str, str]
    dual: Measurement
    test: Measurement
    reference: dict[str, float]
    reward_change: float
    reward_change_se: float
    exact: dict[str, ExactPolicy] | None = None

    @property
    def verdict(self) -> str:
        """Satisfied, violated or undecided, on the test prompts at the setting's levels."""
        return self.test.overall

    def row(self, problem: ConstrainedProblem) -> FrontRow:
        """Give the point in numbers; problem: the recipe's."""
        test, levels = self.test, self.setting.margins
        same = {"key", "round", "lambda_", "kappa", "look", "outside", "kappa_outside", "at_edge"}
        same |= {"reward_change", "reward_change_se"}
        measured = {"reward", "reward_se", "utilities", "u", "u_ci_low", "u_ci_high", "verdicts"}
        measured |= {"kl", "kl_se", "objective", "objective_se", "verdict_confidence"}
        measured |= {"mean_length", "cut_off_fraction"}
        return FrontRow(
            **{name: getattr(self, name) for name in same},
            **{name: getattr(test, name) for name in measured},
            solved=levels is not None,
            levels=levels if levels is not None else problem.bounds.to_dict(),
            gains={n: test.utilities[n] - self.reference[n] for n in problem.names},
            verdict=self.verdict,
            num_trials=len(self.trials),
        )


class Front(Record):
    """The points of a run's fronts (front.json).

    reward: its name; confidence: of all verdicts together; looks: keys in the order in which the
    points look at the test prompts, those of points that are not done yet included; points: those
    that are done. round: whose family the newest are of; levels: the recipe's; low, high: the
    multipliers that this family was trained on, by constraint; reference: π_ref's means on the test
    prompts, by objective.
    """

    reward: str
    confidence: float
    round: int
    levels: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    reference: dict[str, float]
    looks: list[str]
    points: list[FrontRow]

    @property
    def rows(self) -> list[FrontRow]:
        """The points of the newest family, in order."""
        shown = [point for point in self.points if point.round == self.round]
        return sorted(shown, key=lambda point: point.order)
