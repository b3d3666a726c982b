"""The labels of a stretch of a round's fit, from the pool under the round's multipliers."""

import logging

import pandas as pd

from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.labels.groups import label_groups
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.labels.multipliers import MultiplierRange
from data_prep.labels.pool import choose_responses
from data_prep.labels.preferences import label_pairs
from data_prep.prompts.preference_rows import labelled
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.settings import derive_seed
from data_prep.tables import validate_groups, validate_pairs

log = logging.getLogger(__name__)


def write_labels(
    run: RunDirectory,
    recipe: Recipe,
    law: pd.Series | MultiplierRange,
    lambda_: pd.Series,
    number: int,
    stretch: int = 0,
) -> None:
    """Write the pairs or groups of a stretch of a round's fit.

    law: what rows are labelled under, λ itself or a range around it; lambda_: the round's own. A
    round's groups (or pairs) are divided among the stretches of a fit.
    """
    fit, reward = recipe.fit, recipe.problem.reward
    where = f"labels of round {number}"
    output = run.labels_file(number, fit.grouped, stretch)
    if fit.labels == "given":
        pool = recipe.problem.scores(run.pool(recipe, 0))
        score = pd.Series(lagrangian_score(pool, reward, lambda_), index=pool["response_id"])
        pairs = labelled(read_parquet(run.given_pairs_file), score)
        write_parquet(validate_pairs(pairs, where), output)
        return
    # the first stretch has the round's own seed
    seed = derive_seed(recipe.seed, number, "stretch", stretch) if stretch else recipe.seed
    pool = choose_responses(
        recipe.problem.scores(run.pool(recipe, number, stretch)),
        None if recipe.pool.shares is None else recipe.pool.shares.model_dump(),
        recipe.pool.max_per_prompt,
        reward=reward,
        lambda_=lambda_,
        beta=recipe.problem.beta,
        seed=seed,
        round_number=number,
    )
    rule = {"seed": seed, "round_number": number}
    if fit.grouped:
        count = -(-fit.groups_per_prompt // recipe.stretches)
        sizes = {"group_size": fit.group_size, "groups_per_prompt": count}
        groups = label_groups(pool, reward, law, **sizes, **rule)
        write_parquet(validate_groups(groups, where), output)
        return
    pairs_per_prompt = (
        None if fit.pairs_per_prompt == "all" else -(-fit.pairs_per_prompt // recipe.stretches)
    )
    pairs = label_pairs(
        pool, reward, law, labels=fit.labels, pairs_per_prompt=pairs_per_prompt, **rule
    )
    write_parquet(validate_pairs(pairs, where), output)


def unlabelled(run: RunDirectory, recipe: Recipe, number: int) -> int:
    """Count the fit and dual prompts that have no row among a round's labels."""
    prompts = run.prompts()
    fits = prompts["prompt_id"][prompts["split"] != "test"]
    labels = read_parquet(run.labels_file(number, recipe.fit.grouped), ["prompt_id"])
    missing = int((~fits.isin(labels["prompt_id"])).sum())
    if missing:
        log.warning(
            "round %d: %d of %d prompts have nothing to compare and no part in the fit",
            number,
            missing,
            len(fits),
        )
    return missing
