"""E[g] under π_θ from its own samples and π_ref's together."""

import numpy as np
import pandas as pd


def mixed_means(samples: pd.DataFrame, off_policy: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Estimate the mean of every column under π_θ by prompt: (num_prompts, len(names)).

    samples: y ~ π_θ; off_policy: y ~ π_ref with π_θ's log-probabilities; the same prompts. Every
    response is weighted by π_θ over the mixture that both tables are draws of (multiple importance
    sampling with the balance heuristic, Veach and Guibas 1995), so no weight exceeds the mixture's
    inverse share. Each is centred by the weighted mean of the prompt's others, which takes out what
    the weights' own noise would add. Unbiased up to a term of order 1/K². A column that is null
    for a prompt stays so.
    """
    both = pd.concat([samples, off_policy], ignore_index=True)
    prompts = both["prompt_id"]
    count = prompts.groupby(prompts).transform("size")
    own = pd.Series(np.arange(len(both)) < len(samples), index=both.index)
    share = own.groupby(prompts).transform("mean")
    ratio = both["ref_logp"] - both["policy_logp"]
    with np.errstate(over="ignore"):
        weight = 1 / (share + (1 - share) * np.exp(ratio))
    total = weight.groupby(prompts).transform("sum")
    means = {}
    for name in names:
        value = both[name].astype(float)
        weighted = (weight * value).groupby(prompts).transform("sum")
        rest = (total - weight).where(total - weight > 0, np.nan)
        centre = ((weighted - weight * value) / rest).fillna(value)
        means[name] = (
            ((centre + weight * (value - centre)) / count).groupby(prompts).sum(min_count=1)
        )
    index = pd.Index(np.sort(prompts.unique()), name="prompt_id")
    return pd.DataFrame(means, index=index)
