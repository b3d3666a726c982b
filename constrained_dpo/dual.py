"""The dual function D(λ) on tables of scores, and the subgradient u with its error bars. numpy and scipy only.

D(λ) ≈ β E_x log mean_k exp((r + λ·g)/β + log π_ref(y_k) − log q(y_k)) − λ·a, y_k ~ q; one function for every q (for q = π_ref
it is MoCAN's dual function, arXiv:2405.19544). Convex in λ: gradient E_x E_w[g] − a, Hessian (1/β) E_x Cov_w(g), with w the tilted weights.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from constrained_dpo.problem import ConstrainedProblem
from data_prep.settings import UserError
from data_prep.tables import require_columns, require_finite, require_ids


@dataclass(frozen=True)
class ScoreTable:
    """Scores sorted by prompt; ragged numbers of responses allowed.

    reward: (num_responses,); utilities: (num_responses, m), both in score units; log_weight: (num_responses,) log π_ref − log q in nats
    (0 for samples of π_ref); starts: (num_prompts,) first row of each prompt; counts: (num_prompts,).
    """

    reward: np.ndarray
    utilities: np.ndarray
    log_weight: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, problem: ConstrainedProblem, log_weight: str | None = None) -> "ScoreTable":
        """From a responses table; `log_weight` names a column of log π_ref − log q, None means q = π_ref."""
        columns = problem.objectives + ([log_weight] if log_weight else [])
        require_columns(frame, ["prompt_id", *columns], "scores")
        require_ids(frame, ["prompt_id"], "scores")
        require_finite(frame, columns, "scores")
        codes, _ = pd.factorize(frame["prompt_id"])
        order = np.argsort(codes, kind="stable")
        counts = np.bincount(codes)
        return cls(
            reward=frame[problem.reward].to_numpy(np.float64)[order],
            utilities=frame[problem.names].to_numpy(np.float64)[order],
            log_weight=frame[log_weight].to_numpy(np.float64)[order] if log_weight else np.zeros(len(frame)),
            starts=np.concatenate([[0], np.cumsum(counts)[:-1]]),
            counts=counts,
        )

    def prompt_means(self, values: np.ndarray) -> np.ndarray:
        """Mean over a prompt's responses; (num_responses, ...) → (num_prompts, ...)."""
        sums = np.add.reduceat(values, self.starts, axis=0)
        return sums / self.counts.reshape(-1, *[1] * (values.ndim - 1))

    def reference_means(self) -> np.ndarray:
        """ḡ_ref, shape (m,); only for samples of π_ref."""
        return self.prompt_means(self.utilities).mean(axis=0)


@dataclass(frozen=True)
class DualPoint:
    """D(λ) and its derivatives, with the tilted policy's means: value (score units), gradient (m,), hessian (m, m), reward E[r],
    utilities (m,) E[g], kl E_x KL in nats, ess (num_prompts,) effective sample size of the tilted weights."""

    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    reward: float
    utilities: np.ndarray
    kl: float
    ess: np.ndarray


def evaluate_dual(table: ScoreTable, lambda_: np.ndarray, beta: float, levels: np.ndarray) -> DualPoint:
    """One pass over the table. lambda_, levels: (m,) in the order of the table's utilities."""
    # Elementwise sums instead of BLAS products, whose rounding may depend on alignment and threads: a resumed process computes the same λ.
    score = (table.reward + (table.utilities * lambda_).sum(axis=1)) / beta
    exponent = score + table.log_weight
    top = np.maximum.reduceat(exponent, table.starts)
    weight = np.exp(exponent - np.repeat(top, table.counts))
    total = np.add.reduceat(weight, table.starts)
    log_mean = top + np.log(total / table.counts)
    weight /= np.repeat(total, table.counts)
    mean = np.add.reduceat(weight[:, None] * table.utilities, table.starts, axis=0)
    centred = table.utilities - np.repeat(mean, table.counts, axis=0)
    num_prompts = len(table.starts)
    reward = np.add.reduceat(weight * table.reward, table.starts).mean()
    utilities = mean.mean(axis=0)
    return DualPoint(
        value=float(beta * log_mean.mean() - lambda_ @ levels),
        gradient=utilities - levels,
        hessian=np.stack([(centred * (weight * column)[:, None]).sum(axis=0) for column in centred.T]) / (num_prompts * beta)
        if len(lambda_)
        else np.zeros((0, 0)),
        reward=float(reward),
        utilities=utilities,
        # KL(π_λ‖π_ref) = E_λ[s/β] − log Z for the tilted policy.
        kl=float((reward + lambda_ @ utilities) / beta - log_mean.mean()),
        ess=1.0 / np.add.reduceat(weight**2, table.starts),
    )


def prompt_slack(samples: pd.DataFrame, reference: pd.DataFrame, problem: ConstrainedProblem) -> pd.DataFrame:
    """The slack on every prompt, (num_prompts, m) by prompt_id: the policy's mean of g minus π_ref's and minus b (margin), or minus c.

    samples, reference: responses of π_θ and π_ref to the same prompts, under one sampling law. Score units. Raises UserError when the
    prompts differ.
    """
    names = problem.names
    for frame, where in ((samples, "samples"), (reference, "reference")):
        require_columns(frame, ["prompt_id", *names], where)
        require_finite(frame, names, where)
    policy_means = samples.groupby("prompt_id", sort=True)[names].mean()
    reference_means = reference.groupby("prompt_id", sort=True)[names].mean()
    if not policy_means.index.equals(reference_means.index):
        odd = policy_means.index.symmetric_difference(reference_means.index)
        raise UserError(f"u is a paired difference, but {len(odd)} prompts are in only one of the two tables, e.g. {odd[0]!r}")
    return policy_means - reference_means * problem.relative.astype(float) - problem.bounds


def estimate_subgradient(
    samples: pd.DataFrame, reference: pd.DataFrame, problem: ConstrainedProblem, confidence: float = 0.95
) -> pd.DataFrame:
    """u_i = Ê_{π_θ}[g_i] − a_i with clustered standard error and interval: columns u, se, skew, low, high, num_prompts by constraint.

    The mean over prompts of `prompt_slack`; a prompt is one cluster. Score units; skew (of the prompts' slacks) has none. Source: CAID,
    arXiv:2505.19387, Algorithm 1, subgradient of the dual. Raises UserError when the prompts differ.
    """
    names, slack = problem.names, prompt_slack(samples, reference, problem)
    count = len(slack)
    mean = slack.mean()
    error = slack.std(ddof=1) / np.sqrt(count) if count > 1 else pd.Series(np.inf, index=names)
    u = pd.DataFrame({"u": mean, "se": error, "skew": slack.skew().fillna(0.0), "num_prompts": count}, index=names)
    tail = (1 - confidence) / 2
    return u.assign(low=confidence_bound(u, tail), high=confidence_bound(u, 1 - tail))


def confidence_bound(u: pd.DataFrame, probability: float) -> pd.Series:
    """The `probability` quantile of what u may be in truth, by constraint: 0.05 gives a one-sided 95 % lower bound (score units).

    u: columns u, se, skew, num_prompts. Student's t quantile, corrected for the skewness of the prompts' slacks by Hall's cubic
    transformation (On the removal of skewness by transformation, J. R. Stat. Soc. B 54, 1992): with few prompts and a long lower tail,
    a few prompts where the policy fails badly, the plain t-bound claims too much. Without skewness it is the t-bound.
    """
    count, skew = u["num_prompts"].astype(float), u["skew"].astype(float)
    quantile = pd.Series(stats.t.ppf(1 - probability, np.maximum(count - 1, 1)), index=u.index)
    scaled = quantile / np.sqrt(count)
    safe = skew.where(skew.abs() > 1e-6, 1.0)
    corrected = 3 / safe * (np.cbrt(1 + safe * (scaled - safe / (6 * count))) - 1) * np.sqrt(count)
    move = corrected.where(skew.abs() > 1e-6, quantile)
    # Without a standard error (one prompt) nothing is known; without spread the mean is known.
    bound = u["u"] - u["se"].where(np.isfinite(u["se"]), 0.0) * move
    return bound.where(np.isfinite(u["se"]), np.where(probability < 0.5, -np.inf, np.inf))
