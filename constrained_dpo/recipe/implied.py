"""Defaults that another key of the recipe implies, filled into its raw content."""

from collections.abc import Mapping
from typing import Any

from constrained_dpo.recipe.fit import FitSettings
from data_prep.settings import EMBEDDED


def with_implied(content: Any) -> Any:
    """Fill in what other keys imply, where the recipe does not say it itself.

    content: a recipe as it was written; what is no mapping, or has blocks that are none, comes back
    as it is, for the schema to refuse.
    """
    if not isinstance(content, Mapping):
        return content
    names = ("policy", "sampling", "objective", "dual", "fit")
    blocks = {name: content.get(name, {}) for name in names}
    if not all(isinstance(block, Mapping) for block in blocks.values()):
        return content
    fit = {**_family(blocks), **_rates(blocks), **_rows(blocks), **blocks["fit"]}
    return {**content, "fit": fit} if fit else content


def _family(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Another method than solve, or no constraint at all, means one policy."""
    solved = blocks["dual"].get("method", "solve") == "solve"
    if solved and blocks["objective"].get("constraints") != []:
        return {}
    return {"conditional": None}


def _rates(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The embedded world's tiny policy learns at rates that ruin a language model."""
    if blocks["policy"].get("model") != EMBEDDED:
        return {}
    return {"learning_rate": 5e-4, "loraplus_ratio": 16.0}


def _rows(blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Few responses of a prompt make smaller groups."""
    drawn, default = blocks["sampling"].get("responses_per_prompt"), FitSettings().group_size
    return {"group_size": drawn} if type(drawn) is int and 2 <= drawn < default else {}
