"""log Z(x), Z = E_q exp(w), from samples of q: an estimate that is biased low, one that is biased
high, and one between them. numpy and pandas only."""

import numpy as np
import pandas as pd

from constrained_dpo.dual.function import prompt_terms
from constrained_dpo.dual.scores import ScoreTable

FOLDS = 4
"""Of `upper_log_mean`: the tangent point of a fold comes from three times as many samples."""


def log_mean_exp(values: pd.Series, prompts: pd.Series) -> pd.DataFrame:
    """Compute log mean_k exp(values) by prompt: columns plain, jackknife (its bias of order 1/K
    removed), ess, count.

    A mean of logs is at most the log of the mean, so both are biased low; the jackknife less.
    values: (num_responses,) in nats.
    """
    codes, index = pd.factorize(prompts, sort=True)
    exponents = values.to_numpy(np.float64)
    table = ScoreTable.from_columns(codes, exponents, np.zeros((0, len(exponents))))
    terms, counts = prompt_terms(table, np.zeros(0), 1.0), table.counts
    # With mean_k exp(values) = 1, the mean without response i is (K − exp(value_i))/(K − 1); 0
    # where i has all the weight, and then the prompt keeps the plain estimate.
    share = np.exp(table.reward - np.repeat(terms.log_mean, counts))
    size = np.repeat(counts, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = (
            np.add.reduceat(np.log((size - share) / np.maximum(size - 1, 1)), table.starts) / counts
        )
        jackknife = np.where(
            np.isfinite(change) & (counts > 1),
            terms.log_mean - (counts - 1) * change,
            terms.log_mean,
        )
    columns = {"plain": terms.log_mean, "jackknife": jackknife, "ess": terms.ess, "count": counts}
    return pd.DataFrame(columns, index=pd.Index(index, name="prompt_id"))


def upper_log_mean(values: pd.Series, prompts: pd.Series, strata: pd.Series) -> pd.Series:
    """Bound log E exp(values) from above in expectation, by prompt (nats).

    For every c > 0, log Z ≤ log c + Z/c − 1. With c from other samples than the unbiased estimate
    of Z, the right side's expectation is that bound at a random c, so it is at least log Z whatever
    the law. The samples are split into folds; each fold's mean estimates Z, and c is the mean of
    the others. strata: which law drew each row; every fold has the same share of each. Prompts with
    fewer than two responses of a stratum have inf.
    """
    frame = pd.DataFrame(
        {"prompt": prompts.to_numpy(), "stratum": strata.to_numpy(), "value": values.to_numpy()}
    )
    groups = frame.groupby(["prompt", "stratum"], sort=True)["value"]
    fewest = int(groups.size().min())
    if fewest < 2:
        return pd.Series(np.inf, index=pd.Index(np.sort(prompts.unique()), name="prompt_id"))
    folds = min(FOLDS, fewest)
    place, size = groups.cumcount(), groups.transform("size")
    frame = frame[place < size - size % folds].assign(fold=place % folds)
    top = frame.groupby("prompt")["value"].transform("max")
    weight = pd.Series(np.exp((frame["value"] - top).to_numpy()), index=frame.index)
    means = weight.groupby([frame["prompt"], frame["fold"]]).mean().unstack()
    rest = (means.to_numpy().sum(axis=1, keepdims=True) - means.to_numpy()) / (folds - 1)
    # Where all the weight is in one fold, the others give no point; a tiny one keeps the bound.
    point = np.maximum(rest, 1e-12)
    bound = (np.log(point) + means.to_numpy() / point - 1).mean(axis=1)
    highest = frame.groupby("prompt")["value"].max()
    return pd.Series(bound, index=means.index).add(highest).rename_axis("prompt_id")
