"""What a run knows of its scorers before round 0: the unit of margins in std, the scores'
statistics, what `prepare` measured of them."""

import json

import pandas as pd

from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.scorers.calibration import describe_calibration
from data_prep.scorers.settings import ScorerOptions

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def reference_stds(scored: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """Standard deviation of all scores by column, within and between prompts (score units). Raises
    UserError where it is 0."""
    stds = {name: float(scored[name].std(ddof=0)) for name in names}
    for name, std in stds.items():
        if not std > 0:
            raise UserError(
                f"constraint {name}: its margin is in std, but all {len(scored)} reference "
                f"responses score {scored[name].iloc[0]:g}; "
                "give the margin as a number"
            )
    return stds


def score_statistics(
    scored: pd.DataFrame, scorers: dict[str, ScorerOptions]
) -> dict[str, dict[str, float]]:
    """By objective: mean, std, min, max and quantiles of all scores in the table (score units,
    after the scorer's options); where it clips, `clipped`: the share of scores at its bounds."""
    statistics = {}
    for name, options in scorers.items():
        scores = scored[name]
        facts = {
            "mean": scores.mean(),
            "std": scores.std(ddof=0),
            "min": scores.min(),
            "max": scores.max(),
        }
        facts |= {word: scores.quantile(level) for word, level in QUANTILES.items()}
        if options.clip is not None:
            facts["clipped"] = scores.isin(options.clip).mean()
        statistics[name] = {word: float(value) for word, value in facts.items()}
    return statistics


def scorer_facts(
    recipe: Recipe, pool: pd.DataFrame, measured: dict[str, dict]
) -> dict[str, dict[str, object]]:
    """scorers.json, by objective: type, options in words, statistics on π_ref's pool, and what
    `Learner.measured_scorers` found."""
    return {
        name: {
            "type": recipe.scorers[name].type,
            "options": recipe.scorers[name].described(),
            "reference": statistics,
        }
        | measured.get(name, {})
        for name, statistics in score_statistics(pool, recipe.scorers).items()
    }


def describe_statistics(name: str, facts: dict[str, float]) -> str:
    quantiles = " ".join(f"{facts[word]:.3g}" for word in QUANTILES)
    clipped = (
        f"; {100 * facts['clipped']:.0f} % at the bounds of its clip" if "clipped" in facts else ""
    )
    return (
        f"scores of {name}: mean {facts['mean']:.3g}, std {facts['std']:.3g}, quantiles "
        f"5-25-50-75-95 %: {quantiles}{clipped}"
    )


def describe_drift(name: str, drift: dict[str, object]) -> str:
    """`data_prep.drift` in words."""
    how = f"scorer of {name}: {drift['quantization']} against {drift['against']}"
    if "reason" in drift:
        return f"{how}: not measured ({drift['reason']})"
    how += f" on {drift['texts']} fixed texts"
    if drift["largest"] is None:
        return f"{how}: not measured, their scores do not differ or the texts do not fit its window"
    return (
        f"{how}: scores move by {drift['mean']:.2g} std on average, {drift['largest']:.2g} std "
        f"at most (std {drift['std']:.3g})"
    )


def describe_margins(margins: dict[str, tuple[float, float]]) -> list[str]:
    """Margins in std, by constraint (number of std, std in score units), in words."""
    return [
        f"{name}: margin {number:g}std = {number * std:.4g} score units (1 std of π_ref's scores "
        f"on dual prompts: {std:.4g})"
        for name, (number, std) in margins.items()
    ]


def prepared_lines(run: RunDirectory, recipe: Recipe) -> list[str]:
    """What `prepare` has found of the scorers and margins, in words, from scorers.json and the
    resolved recipe."""
    facts = json.loads(run.scorers_file.read_text())
    lines = [describe_statistics(name, found["reference"]) for name, found in facts.items()]
    in_std = {
        c.name: (c.margin_in_std, c.reference_std)
        for c in recipe.objective.constraints
        if c.margin_in_std is not None
    }
    return lines + measured_lines(run) + describe_margins(in_std)


def measured_lines(run: RunDirectory) -> list[str]:
    """Drift of quantized and calibration of implicit scorers, as `prepare` measured them, in
    words."""
    lines = []
    for name, found in json.loads(run.scorers_file.read_text()).items():
        lines += (
            [describe_drift(name, found["quantization_drift"])]
            if "quantization_drift" in found
            else []
        )
        lines += describe_calibration(name, found["calibration"]) if "calibration" in found else []
    return lines
