"""What may be claimed of a policy's distance from the optimum: D(λ) and the gaps, with limits.
numpy and scipy only.

The Lagrangian gap D(λ) − L(π_θ, λ) = β E_x KL(π_θ ‖ π*_λ) ≥ 0 is estimated on the dual prompts from
y_k ~ π_θ with w_k = s_λ(y_k)/β − log π_θ(y_k)/π_ref(y_k) as β E_x[log mean_k exp(w_k) − mean_k
w_k]: log Z by importance weights (the bound of importance- weighted autoencoders,
arXiv:1509.00519), applied to the dual of MoCAN (arXiv:2405.19544).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from constrained_dpo.estimates.kl import controlled, kl_values, log_ratio, path_noise
from constrained_dpo.estimates.log_partition import log_mean_exp, upper_log_mean
from constrained_dpo.monte_carlo import MIN_ESS, standard_error
from constrained_dpo.problem import ConstrainedProblem
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.records import Record

MIN_RESPONSES = 4


MIN_ESS_SHARE = 1 / 8
"""Below MIN_RESPONSES samples of a prompt, or a mean effective sample size under MIN_ESS or under
this share of the samples, log mean exp is no estimate of log Z: the few heavy weights that were
drawn say that heavier ones were not."""


DOMINATED, MAX_DOMINATED = 2.0, 1 / 10
"""A prompt with an effective sample size under DOMINATED, where one weight is about all of the sum,
has no bias of order 1/K that could be removed, and a share of such prompts over MAX_DOMINATED no
mean effective sample size makes good."""


class Certificate(Record):
    """What may be claimed of a policy's distance from the optimum (score units, dual prompts).

    lagrangian: L(π_θ, λ) with its standard error; ess: effective sample size per prompt; residual:
    `off_policy_residual`; dual_value: D(λ), dual_value_source the samples it comes from, and
    dual_values those of all sources; lagrangian_gap: D(λ) − L(π_θ, λ); optimality_gap: D(λ) − the
    objective; disagreement: a source that sees mass which π_θ's samples miss.

    Each has a standard error (`*_se`) and an interval (`*_low`, `*_high`), two of them beyond an
    estimate that is biased low and one that is biased high. The lower end holds whatever the
    samples miss. The upper end can fail where the best answers are rarer than one in all draws. The
    estimate between them is None where the samples cannot carry it, and the interval where there is
    none, for certificate_reason.
    """

    lagrangian: float | None = None
    lagrangian_se: float | None = None
    ess: float | None = None
    residual: float | None = None
    dual_value: float | None = None
    dual_value_se: float | None = None
    dual_value_source: str | None = None
    dual_values: dict[str, float] | None = None
    dual_value_low: float | None = None
    dual_value_high: float | None = None
    lagrangian_gap: float | None = None
    lagrangian_gap_se: float | None = None
    lagrangian_gap_low: float | None = None
    lagrangian_gap_high: float | None = None
    optimality_gap: float | None = None
    optimality_gap_se: float | None = None
    optimality_gap_low: float | None = None
    optimality_gap_high: float | None = None
    disagreement: str | None = None
    certificate_reason: str | None = None


def _score(table: pd.DataFrame, problem: ConstrainedProblem, lambda_: pd.Series) -> pd.Series:
    scores = lagrangian_score(problem.scores(table), problem.reward, lambda_.reindex(problem.names))
    return pd.Series(scores, index=table.index)


def _centred(values: pd.Series, prompts: pd.Series) -> pd.Series:
    return values - values.groupby(prompts).transform("mean")


def off_policy_residual(
    table: pd.DataFrame, problem: ConstrainedProblem, lambda_: pd.Series
) -> float:
    """Std within prompts of s_λ − β log π_θ/π_ref over responses of *any* sampling law (score
    units): 0 at the maximizer.

    table: responses with policy_logp of the policy in question; prompts with one response say
    nothing and are left out.
    """
    rest = _centred(
        _score(table, problem, lambda_) - problem.beta * log_ratio(table), table["prompt_id"]
    )
    free = len(table) - table["prompt_id"].nunique()
    return float(np.sqrt((rest**2).sum() / free)) if free > 0 else float("nan")


def dual_estimates(
    samples: pd.DataFrame,
    others: dict[str, pd.DataFrame],
    off_policy: pd.DataFrame | None,
    problem: ConstrainedProblem,
    lambda_: pd.Series,
) -> pd.DataFrame:
    """Estimate β log Z(x) by prompt from every source whose law is known: columns (source, log_z |
    plain | upper | ess), rows the samples' prompts.

    samples: y ~ π_θ. others: responses of other policies to the same prompts with the
    log-probability under their own law (`sample_logp`). off_policy: π_ref's responses with π_θ's
    log-probabilities; with the samples they are draws of a mixture of both policies, whose weights
    are bounded where π_ref has mass (balance heuristic, Veach and Guibas 1995). Jackknifed at
    prompts that no single response dominates, where the leave-one-out means say how far off log is;
    elsewhere they would add up to (K−1)/K of all that the one weight is above the others, and the
    plain estimate stands, which is biased low: still a bound from below.
    """
    tables = {"policy": (samples, samples["policy_logp"])} | {
        name: (table, table["sample_logp"]) for name, table in others.items()
    }
    if off_policy is not None and len(off_policy):
        both = pd.concat([samples, off_policy], ignore_index=True)
        share = len(samples) / len(both)
        tables["mixture"] = (
            both,
            np.logaddexp(both["policy_logp"] + np.log(share), both["ref_logp"] + np.log(1 - share)),
        )
    prompts, columns = np.sort(samples["prompt_id"].unique()), {}
    for name, (table, law) in tables.items():
        if not np.array_equal(np.sort(table["prompt_id"].unique()), prompts):
            continue
        exponent = _score(table, problem, lambda_) / problem.beta + table["ref_logp"] - law
        value = log_mean_exp(exponent, table["prompt_id"])
        upper = upper_log_mean(exponent, table["prompt_id"], table["source"])
        columns[name, "log_z"] = problem.beta * value["jackknife"].where(
            value["ess"] >= DOMINATED, value["plain"]
        )
        columns[name, "plain"] = problem.beta * value["plain"]
        columns[name, "upper"] = problem.beta * upper
        columns[name, "ess"] = value["ess"]
    return pd.DataFrame(columns)


def _mean_se(values: pd.Series) -> tuple[float, float]:
    return float(values.mean()), standard_error(values)


def _exceeds(values: pd.Series, others: pd.Series) -> bool:
    """Whether a mean over prompts is larger than another by more than two standard errors of the
    difference."""
    mean, se = _mean_se(values - others)
    return mean > 2 * se


def missed_mass(estimates: pd.DataFrame, source: str, beta: float) -> tuple[float, float, float]:
    """By how much other sources see more of Z(x) than `source` does: mean over prompts of β (max_s
    log Z_s − log Z_source), the most that chance gives, β log S for S sources (score units), and
    the share of prompts at which another exceeds it by over two nats.

    Every Z_s is unbiased, so E max_s log Z_s ≤ log E Σ_s Z_s = log Z + log S (Jensen): what is
    beyond is mass that `source` has not seen, and where other rounds' samples show mass that this
    one's miss there may be as much that none has seen. estimates: `dual_estimates`; π_θ's own
    samples are in the mixture and count once.
    """
    plain = pd.DataFrame(estimates.xs("plain", axis=1, level=1))
    if "mixture" in plain and source != "policy":
        plain = plain.drop(columns="policy")
    most = plain.max(axis=1)
    missed = (
        most.mean() - estimates[source, "log_z"].mean()
    )  # jackknifed: its own bias is no missed mass
    return (
        float(missed),
        beta * float(np.log(plain.shape[1])),
        float((most - plain[source] > 2 * beta).mean()),
    )


def certify(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    others: dict[str, pd.DataFrame],
    off_policy: pd.DataFrame | None,
    problem: ConstrainedProblem,
    lambda_: pd.Series,
) -> Certificate:
    """Certify one round on the dual prompts.

    Standard errors are clustered by prompt; where log Z enters they hold the jackknife's correction
    too, since the bias that is left may be of its size.

    samples: y ~ π_θ; reference: y ~ π_ref; others: samples of other policies by name, π_ref's among
    them; off_policy: π_ref's responses with π_θ's log-probabilities; all scored, all on the same
    prompts. dual_value is the mixture's estimate of D(λ) (π_θ's own without off_policy), or the
    largest of the other sources' that exceed it by more than two standard errors, because every one
    is biased low and none sees a mode that it never sampled. `disagreement` names the source that
    exceeds the estimate from π_θ's own samples by more than two standard errors. Nothing is claimed
    where `_why_not` says why.
    """
    estimates = dual_estimates(samples, others, off_policy, problem, lambda_)
    lam = lambda_.reindex(problem.names)
    base = problem.reference_scores(reference).groupby("prompt_id")[problem.names].mean()
    levels = (base * problem.relative.astype(float) + problem.bounds).mul(lam).sum(axis=1)
    penalty, noise = problem.beta * kl_values(samples), path_noise(samples)
    prompts = samples["prompt_id"]
    lagrangian, objective = (
        controlled(values - penalty, noise, prompts).groupby(prompts).mean()
        for values in (_score(samples, problem, lambda_), samples[problem.reward])
    )
    lagrangian = lagrangian - levels
    value, error = _mean_se(lagrangian)
    certificate = Certificate(
        lagrangian=value,
        lagrangian_se=error,
        ess=float(estimates["policy", "ess"].mean()),
        residual=None if off_policy is None else off_policy_residual(off_policy, problem, lambda_),
    )
    source = _dual_source(estimates)
    update = _ends(estimates, levels, lagrangian, objective)
    reason = _why_not(samples, estimates, source, problem.beta)
    if reason is not None:
        return certificate.model_copy(update=update | {"certificate_reason": reason})
    names = _sources(estimates)
    dual = estimates[source, "log_z"] - levels
    bias = float((estimates[source, "log_z"] - estimates[source, "plain"]).mean())
    claims = {"dual_value": dual, "lagrangian_gap": dual - lagrangian}
    claims["optimality_gap"] = dual - objective
    for name, values in claims.items():
        mean, error = _mean_se(values)
        update |= {name: mean, f"{name}_se": float(np.hypot(error, bias))}
    update["dual_value_source"] = source
    update["dual_values"] = {n: _mean_se(estimates[n, "log_z"] - levels)[0] for n in names}
    if _exceeds(estimates[source, "log_z"], estimates["policy", "log_z"]):
        update["disagreement"] = source
    return certificate.model_copy(update=update)


def _ends(
    estimates: pd.DataFrame, levels: pd.Series, lagrangian: pd.Series, objective: pd.Series
) -> dict[str, object]:
    """The intervals' ends, from paired differences over prompts. The lower one is the largest that
    any source gives, since each is valid; the upper one is that of π_θ's and π_ref's samples."""
    main = "mixture" if "mixture" in _sources(estimates) else "policy"
    ends: dict[str, object] = {}
    claims: dict[str, pd.Series | float] = {
        "dual_value": 0.0,
        "lagrangian_gap": lagrangian,
        "optimality_gap": objective,
    }
    for name, other in claims.items():
        lows = []
        for source in _sources(estimates):
            mean, error = _mean_se(estimates[source, "plain"] - levels - other)
            lows.append(mean - 2 * error)
        mean, error = _mean_se(estimates[main, "upper"] - levels - other)
        high = mean + 2 * error
        finite = bool(np.isfinite(high)) and max(lows) <= high
        ends |= {f"{name}_low": max(lows), f"{name}_high": high if finite else None}
    return ends


def _sources(estimates: pd.DataFrame) -> list[str]:
    """The sources of `dual_estimates` that have a value."""
    return [str(column[0]) for column in estimates.columns if column[1] == "log_z"]


def _dual_source(estimates: pd.DataFrame) -> str:
    """Whose samples D(λ) is estimated from; estimates: `dual_estimates`."""
    names = _sources(estimates)
    main = "mixture" if "mixture" in names else "policy"
    higher = [n for n in names if _exceeds(estimates[n, "log_z"], estimates[main, "log_z"])]
    return max([main, *higher], key=lambda name: estimates[name, "log_z"].mean())


def _why_not(
    samples: pd.DataFrame, estimates: pd.DataFrame, source: str, beta: float
) -> str | None:
    """Why D(λ) is not estimated: fewer than MIN_RESPONSES samples of a prompt, a mean effective
    sample size under MIN_ESS or MIN_ESS_SHARE of the samples, one response dominating at more than
    MAX_DOMINATED of the prompts, or other sources that show more mass than chance does."""
    fewest = int(samples.groupby("prompt_id").size().min())
    if fewest < MIN_RESPONSES:
        return (
            f"{fewest} responses of a prompt are too few (at least {MIN_RESPONSES}): raise "
            "dual.responses_per_prompt"
        )
    ess = float(estimates["policy", "ess"].mean())
    if ess < (least := max(MIN_ESS, MIN_ESS_SHARE * len(samples) / len(estimates))):
        return (
            f"the effective sample size is {ess:.1f} of {fewest} responses per prompt (at least "
            f"{least:g}): the policy is far from the maximizer at this β, or the scores are too "
            "widely spread for so few responses"
        )
    dominated = float((estimates["policy", "ess"] < DOMINATED).mean())
    if dominated > MAX_DOMINATED:
        return (
            f"at {100 * dominated:.0f} % of the prompts one response has about all of the weight "
            f"(at {100 * MAX_DOMINATED:.0f} % it may), whatever the effective sample size is on "
            "average: better answers may well be missing there"
        )
    missed, chance, prompts = missed_mass(estimates, source, beta)
    if missed > chance:
        return (
            f"other policies' samples show answers that these miss: at {100 * prompts:.0f} % of "
            f"the prompts they put log Z higher by over 2 nats, on average by {missed:.2g} score "
            f"units (chance: {chance:.2g} at most), so that no estimate is trusted"
        )
    return None


def best_bound(rounds: Sequence[Certificate]) -> Certificate | None:
    """Find the smallest D over rounds, which bounds P*; None where no round has one."""
    values = [(c.dual_value, i) for i, c in enumerate(rounds) if c.dual_value is not None]
    return rounds[min(values)[1]] if values else None
