"""Where things are, and the overrides of a real run that takes seconds a round."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


RECIPES = REPO / "recipes"


DATA = REPO / "tests" / "data"


QUICKSTART = DATA / "quickstart_pairs.yaml"


REAL = (
    REPO.parent / "shared" / "real" / "hh-mini"
)  # not part of the project: tests that need it skip without it


# A real run that takes seconds a round.
SMALL = (
    "prompts.max_fit=24",
    "prompts.max_test=12",
    "sampling.responses_per_prompt=8",
    "dual.responses_per_prompt=8",
)


SMALL += ("sampling.batch_size=64", "fit.steps=30", "dual.rounds=2")


SOLVED = (
    "dual.method=solve",
    "dual.trials=3",
    "dual.confidence_side=none",
    "fit.conditional={kappa: [0.5, 1.5]}",
    "fit.refresh=2",
    "fit.loraplus_ratio=8",
)


# A small family.
CONDITIONAL = (
    *SMALL,
    *SOLVED,
    "fit.steps=12",
    "fit.pairs_per_prompt=32",
    "dual.responses_per_prompt=16",
    "sampling.batch_size=128",
)
