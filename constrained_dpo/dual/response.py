"""What all trials together predict of v and KL at a point (λ, κ). numpy only.

Every trial j predicts v_i at z = (λ, κ) as v_ij + ρ_i d_ij, d_ij = ½(J_ij + J_i)·(z − z_j) being
the change that the maximizer would show (J_ij: the slopes at j, J_i: those near z; the trapezoid
rule). The response ratio ρ_i, prior 1 ± ½, is below 1 for a family that is half fitted; and as a
family does not keep its constraints wholly apart, v_i also has shares γ_ik of the other
constraints' changes d_kj, prior 0 ± 0.2 in standard deviations of each score. The error is the
trial's standard error, plus a share of the change that grows with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from constrained_dpo.dual.trial import Trial

PRIOR_SD = 0.5  # of the response ratio around 1


RATIO_RANGE = (0.001, 3.0)


MODEL_ERROR = 0.15  # of a predicted change, relative, however small it is


CURVATURE = 0.25  # what is added to that by a change of one standard deviation of the score


PASSES = 3  # of the regression, whose weights depend on the ratio


LEAK_SD = 0.2  # of what a change of another constraint's u adds to this one's, in std of each


TOO_LITTLE_SPREAD = 0.2  # a standard error of the ratio, from which "answers" cannot be told


@dataclass(frozen=True)
class Local:
    """Predictions at a point; outputs are v by constraint, then KL where it is known.

    value, se, ratio: (num_outputs,); slope: (num_outputs, m + 1) of the maximizer, by λ and κ;
    change: (num_trials, num_outputs) from each trial to the point, before the ratio.
    """

    value: np.ndarray
    se: np.ndarray
    ratio: np.ndarray
    slope: np.ndarray
    change: np.ndarray


@dataclass(frozen=True)
class Response:
    """Trials as arrays: points (num_trials, m + 1), λ then κ; values, se, spread (num_trials,
    num_outputs): the outputs, their standard errors, and the score's standard deviation within
    prompts; slopes (num_trials, num_outputs, m + 1); concerned: share of the prompts that each
    constraint concerns, (m,)."""

    points: np.ndarray
    values: np.ndarray
    se: np.ndarray
    spread: np.ndarray
    slopes: np.ndarray
    concerned: np.ndarray

    @classmethod
    def of(cls, trials: Sequence[Trial], names: list[str], *, with_kl: bool) -> "Response":
        """Stack trials; with_kl: KL is an output too. Raises ValueError where a trial has none."""
        rows = [_row(trial, names, with_kl) for trial in trials]
        concerned = np.array([trials[-1].concerned.get(name, 1.0) for name in names])
        points, values, se, spread, slopes = (
            np.stack(column) for column in zip(*rows, strict=True)
        )
        return cls(points, values, se, spread, slopes, concerned)

    def at(self, point: np.ndarray) -> Local:
        """Predict at point, (m + 1,)."""
        steps = point - self.points
        near = np.einsum("toz,tz->to", self.slopes, steps) / self.spread
        closeness = 1.0 / (0.01 + (near**2).max(axis=1, initial=0.0))
        slope = np.einsum("t,toz->oz", closeness / closeness.sum(), self.slopes)
        change = np.einsum("toz,tz->to", self.slopes + slope, steps) / 2
        m = len(self.concerned)
        fits = []
        for o, spread in enumerate(self.spread.T):
            others = np.delete(np.arange(m), o) if o < m else np.arange(0)
            moved = change[:, others] / self.spread[:, others] * spread[:, None]
            rows = (-change[:, o], -moved, self.values[:, o], self.se[:, o], spread)
            fits.append(_likeliest(*rows))
        value, se, ratio = np.array(fits).reshape(-1, 3).T
        return Local(value, se, ratio, slope, change)

    def answers(self, local: Local) -> np.ndarray:
        """Tell by output whether it follows the predicted change: ρ̂ > 2 SE(ρ̂) by weighted least
        squares without a prior, or too little spread to tell, (num_outputs,)."""
        weight = 1.0 / self.se**2
        total = weight.sum(axis=0)
        change = -local.change + (weight * local.change).sum(axis=0) / total
        square = (weight * change**2).sum(axis=0)
        product = (weight * change * self.values).sum(axis=0)
        unclear = square <= TOO_LITTLE_SPREAD**-2
        return np.asarray(unclear | (product > 2 * np.sqrt(square)))


def _row(trial: Trial, names: list[str], with_kl: bool) -> tuple[np.ndarray, ...]:
    point = [*(trial.lambda_[n] for n in names), trial.kappa]
    values, se = [trial.v[n] for n in names], [trial.u_se[n] for n in names]
    slopes = [[*(trial.slope[n][j] for j in names), trial.slope_kappa[n]] for n in names]
    shares = [trial.concerned.get(name, 1.0) for name in names]
    spread = [e * np.sqrt(trial.num_samples * s) for e, s in zip(se, shares, strict=True)]
    if with_kl:
        if trial.kl is None or trial.kl_se is None:
            raise ValueError("a KL budget needs trials whose samples have log-probabilities")
        values, se = [*values, trial.kl], [*se, trial.kl_se]
        slopes = [*slopes, [*(trial.kl_slope[n] for n in names), trial.kl_slope_kappa]]
        spread = [*spread, max(trial.kl, trial.kl_se * np.sqrt(trial.num_samples))]
    least = 1e-9 * (1.0 + np.abs(values))
    return (
        np.array(point),
        np.array(values),
        np.maximum(se, least),
        np.maximum(spread, least),
        np.array(slopes).reshape(len(values), len(point)),
    )


def _likeliest(
    change: np.ndarray, others: np.ndarray, values: np.ndarray, se: np.ndarray, spread: np.ndarray
) -> tuple[float, float, float]:
    """Fit one output, (num_trials,) each, with the doubt of the change that the family shows: from
    a family that answers as the maximizer would, and from one that does not at all; the likelier.

    others: (num_trials, num_others) changes of the other constraints, in this one's units.
    """
    fits = []
    for ratio in (1.0, 0.0):
        leak = np.zeros(others.shape[1])
        for _ in range(PASSES):
            moved = np.abs(ratio * change) + np.abs(others) @ np.abs(leak)
            doubt = moved * (MODEL_ERROR + CURVATURE * moved / spread)
            weight = 1.0 / (se**2 + doubt**2)
            value, error, ratio, leak = _regression(change, others, values, weight)
        missed = values - value - ratio * change - others @ leak
        prior = ((ratio - 1) / PRIOR_SD) ** 2 + float((leak**2).sum()) / LEAK_SD**2
        likelihood = float((np.log(weight) - weight * missed**2).sum()) - prior
        fits.append((likelihood, (value, error, ratio)))
    return max(fits)[1]


def _regression(
    change: np.ndarray, others: np.ndarray, values: np.ndarray, weight: np.ndarray
) -> tuple[float, float, float, np.ndarray]:
    """Fit values = c + ρ change + others γ with ρ ~ 1 ± PRIOR_SD within RATIO_RANGE and γ ~ 0 ±
    LEAK_SD; c, its SE, ρ and γ."""
    root = np.sqrt(weight)
    rows = np.column_stack([np.ones_like(change), change, others]) * root[:, None]
    priors = np.diag([0.0, 1 / PRIOR_SD, *[1 / LEAK_SD] * others.shape[1]])[1:]
    system = np.vstack([rows, priors])
    goal = np.concatenate([values * root, [1 / PRIOR_SD], np.zeros(others.shape[1])])
    inverse = np.linalg.pinv(system, rcond=1e-15)
    solution, error = inverse @ goal, float(np.linalg.norm(inverse[0]))
    ratio = float(np.clip(solution[1], *RATIO_RANGE))
    if ratio != solution[1]:
        rest = np.delete(system, 1, axis=1)
        solution = np.linalg.lstsq(rest, goal - ratio * system[:, 1], rcond=None)[0]
        return float(solution[0]), error, ratio, solution[1:]
    return float(solution[0]), error, ratio, solution[2:]
