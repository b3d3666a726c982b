"""The categories of a recipe's constraints, from the prompts."""

import logging

import pandas as pd

from constrained_dpo.recipe.schema import Recipe
from data_prep.prompts.categories import OTHER, category_counts, pooled

log = logging.getLogger(__name__)


def categorized(recipe: Recipe, prompts: pd.DataFrame) -> Recipe:
    """Find the categories that constraints are by, where the recipe does not have them yet.

    prompts: the prompts table with the recipe's category columns. Says which were pooled, and how
    many prompts have no category. Raises UserError where a category has too few prompts.
    """
    categories = {}
    for settings in recipe.objective.constraints:
        if settings.by is None or settings.categories is not None:
            continue
        key = f"objective.constraints.{settings.name}.by: {settings.by}"
        counts = category_counts(prompts, settings.by)
        names = categories[settings.name] = pooled(counts, settings.min_prompts, key)
        if OTHER in names:
            log.warning(
                "%s: fewer than %d dual or test prompts, and so together as `%s`: %s",
                key,
                settings.min_prompts,
                OTHER,
                ", ".join(names[OTHER]),
            )
        if without := int((prompts[settings.by].map(len) == 0).sum()):
            log.warning(
                "%s: %d of %d prompts have no category; %s is not constrained on them",
                key,
                without,
                len(prompts),
                settings.name,
            )
    return recipe.with_categories(categories)
