"""u, the slack of every constraint, from samples of a policy and of π_ref."""

import pandas as pd

from constrained_dpo.estimates.intervals import confidence_bound
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from data_prep.records import Record
from data_prep.tables import require_columns, require_finite


def prompt_slack(
    samples: pd.DataFrame, reference: pd.DataFrame, problem: ConstrainedProblem
) -> pd.DataFrame:
    """The slack on every prompt, (num_prompts, m) by prompt_id: the policy's mean of g minus
    π_ref's and minus b (margin), or minus c.

    samples, reference: responses of π_θ and π_ref to the same prompts, under one sampling law.
    Score units. Raises UserError when the prompts differ.
    """
    names = problem.names
    for frame, where in ((samples, "samples"), (reference, "reference")):
        require_columns(frame, ["prompt_id", *names], where)
        require_finite(frame, names, where)
    policy_means = samples.groupby("prompt_id", sort=True)[names].mean()
    reference_means = reference.groupby("prompt_id", sort=True)[names].mean()
    if not policy_means.index.equals(reference_means.index):
        odd = policy_means.index.symmetric_difference(reference_means.index)
        raise UserError(
            f"u is a paired difference, but {len(odd)} prompts are in only one of the two tables, "
            f"e.g. {odd[0]!r}"
        )
    return policy_means - reference_means * problem.relative.astype(float) - problem.bounds


def estimate_subgradient(
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    problem: ConstrainedProblem,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """u_i = Ê_{π_θ}[g_i] − a_i with clustered standard error and interval: columns u, se, skew,
    low, high, num_prompts by constraint.

    The mean over prompts of `prompt_slack`; a prompt is one cluster. Score units; skew (of the
    prompts' slacks) has none. Source: CAID, arXiv:2505.19387, Algorithm 1, subgradient of the dual.
    Raises UserError when the prompts differ.
    """
    names, slack = problem.names, prompt_slack(samples, reference, problem)
    count = len(slack)
    mean = slack.mean()
    error = pd.Series({name: standard_error(slack[name]) for name in names}, dtype=float)
    u = pd.DataFrame(
        {"u": mean, "se": error, "skew": slack.skew().fillna(0.0), "num_prompts": count},
        index=names,
    )
    tail = (1 - confidence) / 2
    return u.assign(low=confidence_bound(u, tail), high=confidence_bound(u, 1 - tail))


class Change(Record):
    """An objective's means under both policies and their paired difference with its standard error
    and interval, clustered by prompt (score units)."""

    reference: float
    policy: float
    difference: float
    se: float
    ci_low: float
    ci_high: float


def changes(
    samples: pd.DataFrame, reference: pd.DataFrame, objectives: list[str], confidence: float
) -> dict[str, Change]:
    """Compare every objective under two policies.

    samples, reference: responses to the same prompts.
    """
    # A margin of 0 over the reference makes u the paired difference itself.
    constraints = tuple(Constraint(name, margin=0.0) for name in objectives)
    differences = ConstrainedProblem("none", 1.0, constraints)
    table = estimate_subgradient(samples, reference, differences, confidence)
    rows = table.to_dict("index")
    return {
        name: Change(
            reference=float(reference.groupby("prompt_id")[name].mean().mean()),
            policy=float(samples.groupby("prompt_id")[name].mean().mean()),
            difference=rows[name]["u"],
            se=rows[name]["se"],
            ci_low=rows[name]["low"],
            ci_high=rows[name]["high"],
        )
        for name in objectives
    }
