"""Turn prompts, a policy and scorers into validated tables. Never imports `constrained_dpo`.

The names below are the documented API (docs/reference.md). They are loaded when first used, so
`import data_prep` is instant and imports no network library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.errors import UserError
    from data_prep.labels.groups import label_groups
    from data_prep.labels.lagrangian import lagrangian_score
    from data_prep.labels.pair_texts import PairTexts
    from data_prep.labels.preferences import label_pairs
    from data_prep.labels.relabel import relabel_groups, relabel_pairs
    from data_prep.prompts.split import split_prompts
    from data_prep.readers.tables import read_table
    from data_prep.scorers.scoring import make_scorer, score_texts

_PLACES = {
    "PairTexts": "data_prep.labels.pair_texts",
    "UserError": "data_prep.errors",
    "label_groups": "data_prep.labels.groups",
    "label_pairs": "data_prep.labels.preferences",
    "lagrangian_score": "data_prep.labels.lagrangian",
    "make_scorer": "data_prep.scorers.scoring",
    "read_table": "data_prep.readers.tables",
    "relabel_groups": "data_prep.labels.relabel",
    "relabel_pairs": "data_prep.labels.relabel",
    "score_texts": "data_prep.scorers.scoring",
    "split_prompts": "data_prep.prompts.split",
}

__all__ = [
    "PairTexts",
    "UserError",
    "label_groups",
    "label_pairs",
    "lagrangian_score",
    "make_scorer",
    "read_table",
    "relabel_groups",
    "relabel_pairs",
    "score_texts",
    "split_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
