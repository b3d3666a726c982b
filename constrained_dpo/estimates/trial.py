"""A trial of the conditional policy, measured on its samples."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from constrained_dpo.dual.trial import Trial
from constrained_dpo.estimates.kl import controlled, kl_values, path_noise
from constrained_dpo.estimates.slack import prompt_slack
from constrained_dpo.problem import ConstrainedProblem, by_name
from data_prep.errors import UserError
from data_prep.tables import score_values


def trial(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    lambda_: pd.Series,
    kappa: float,
    shift: Mapping[str, float],
) -> Trial:
    """Measure u, KL and their slopes on samples of π(y|x; λ, κ).

    samples, reference: scored responses of the policy and of π_ref to the same prompts; samples
    with policy_logp and ref_logp (nats) in every row give KL, sharper with path_kl. With s_λ = r +
    λ·g and covariances within prompts, for u_i over those that constraint i concerns: du_i/dλ_j =
    κ Cov(g_i, g_j)/β, du_i/dκ = Cov(g_i, s_λ)/β,
    dKL/dλ_j = κ² Cov(s_λ, g_j)/β², dKL/dκ = κ Var(s_λ)/β² (derivatives of the exponential family's
    mean and of KL = E[κ s_λ/β] − log Z). Raises UserError when the prompts differ, or when no
    prompt has two responses.
    """
    names, beta = problem.names, problem.beta
    slack = prompt_slack(samples, reference, problem)
    samples = problem.scores(samples)
    lam = lambda_.reindex(names).to_numpy(np.float64)
    columns = [score_values(samples, name) for name in names]
    utilities = np.array(columns).reshape(len(names), len(samples)).T
    lagrangian = samples[problem.reward].to_numpy(np.float64) + utilities @ lam
    scores = np.column_stack([utilities, lagrangian])
    covariance, se = _within_prompts(scores, samples["prompt_id"])
    concerned = slack.notna().mean().to_numpy(np.float64)
    g_g, g_s = covariance[:-1, :-1] / concerned[:, None], covariance[:-1, -1] / concerned
    kl, kl_se = _kl(samples)
    slope = kappa * g_g / beta
    return Trial(
        lambda_=by_name(lambda_.reindex(names)),
        kappa=kappa,
        u={name: float(slack[name].mean()) for name in names},
        u_se=by_name(pd.Series(se[:-1] / concerned, index=names)),
        concerned=by_name(pd.Series(concerned, index=names)),
        shift={name: float(shift[name]) for name in names},
        slope={n: by_name(pd.Series(r, index=names)) for n, r in zip(names, slope, strict=True)},
        kl=kl,
        kl_se=kl_se,
        slope_kappa=by_name(pd.Series(g_s / beta, index=names)),
        kl_slope=by_name(pd.Series(kappa**2 * g_s * concerned / beta**2, index=names)),
        kl_slope_kappa=float(kappa * covariance[-1, -1] / beta**2),
        num_samples=len(samples),
    )


def _within_prompts(values: np.ndarray, prompts: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Give the mean over prompts of the covariance within them, (k, k), and the standard error of
    the mean over prompts for these prompts, (k,).

    values: (num_samples, k). A prompt with one response has the others' mean variance.
    """
    codes, _ = pd.factorize(prompts)
    counts = np.bincount(codes)
    if counts.max() < 2:
        raise UserError(
            "a trial needs at least two responses of a prompt, to tell how u answers λ; sample more"
        )
    sums = np.column_stack([np.bincount(codes, column) for column in values.T])
    centred = values - (sums / counts[:, None])[codes]
    many = counts > 1
    weight = np.where(many, 1.0 / np.maximum(counts - 1, 1), 0.0)[codes]
    covariance = (centred * weight[:, None]).T @ centred / many.sum()
    squares = [np.bincount(codes, column) for column in (centred**2 * weight[:, None]).T]
    variance = np.where(many[:, None], np.column_stack(squares), np.diag(covariance))
    se = np.sqrt((variance / counts[:, None]).sum(axis=0)) / len(counts)
    return covariance, se


def _kl(samples: pd.DataFrame) -> tuple[float | None, float | None]:
    """Estimate KL(π‖π_ref) and its standard error for these prompts, nats."""
    columns = ["policy_logp", "ref_logp"]
    if not set(columns) <= set(samples.columns) or samples[columns].isna().any(axis=None):
        return None, None
    if "path_kl" not in samples:
        samples = samples.assign(path_kl=np.nan)
    prompts = samples["prompt_id"]
    values = controlled(kl_values(samples), path_noise(samples), prompts)
    _, se = _within_prompts(values.to_numpy(np.float64)[:, None], prompts)
    return float(values.groupby(prompts).mean().mean()), float(se[0])
