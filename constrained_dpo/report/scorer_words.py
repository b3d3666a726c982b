"""What is known of the scorers, in words."""

import math
from typing import Any

from constrained_dpo.estimates.intervals import proportion_interval
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import QUANTILES, ScorerFacts, read_scorer_facts


def describe_statistics(name: str, facts: dict[str, float]) -> str:
    quantiles = " ".join(f"{facts[word]:.3g}" for word in QUANTILES)
    clipped = (
        f"; {100 * facts['clipped']:.0f} % at the bounds of its clip" if "clipped" in facts else ""
    )
    return (
        f"scores of {name}: mean {facts['mean']:.3g}, std {facts['std']:.3g} (within prompts "
        f"{facts['std_within']:.3g}), quantiles "
        f"5-25-50-75-95 %: {quantiles}{clipped}"
    )


def describe_drift(name: str, drift: dict[str, Any]) -> str:
    """`measure_drift` in words."""
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
        f"{name}: margin {number:g}std = {number * std:.4g} score units (1 std of all of π_ref's "
        f"scores, within and between the dual prompts: {std:.4g})"
        for name, (number, std) in margins.items()
    ]


def describe_calibration(name: str, record: dict) -> list[str]:
    """A calibration record in words: one line on the reference pool, one or two on the labelled
    pairs."""
    spread = "unknown" if record["std_within"] is None else f"{record['std_within']:.3g}"
    lines = [
        f"implicit scorer of {name}, β {record['beta']:g}: std within a prompt {spread} on "
        "π_ref's responses; only differences within a "
        "prompt mean anything (log Z(x) is unknown)"
    ]
    pairs = record["labelled"]
    if pairs is None:
        return [
            *lines,
            f"implicit scorer of {name}: not compared with labelled preferences (set its "
            "calibrate to a table of them)",
        ]
    bins = [b for b in pairs["bins"] if b["pairs"]]
    table = ", ".join(f"{b['claimed']:.2f} → {b['observed']:.2f} ({b['pairs']})" for b in bins)
    count = pairs["right"] * pairs["pairs"]  # a tie counts half
    low = proportion_interval(math.floor(count), pairs["pairs"])[0]
    high = proportion_interval(math.ceil(count), pairs["pairs"])[1]
    right = f"{100 * pairs['right']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return [
        *lines,
        f"implicit scorer of {name}: orders {right} of {pairs['pairs']} labelled pairs (of "
        f"{pairs['pairs_in_file']} in {pairs['file']}) as "
        f"labelled, log-loss {pairs['log_loss']:.3f} (a coin: 0.693)",
        f"implicit scorer of {name}: probability it gives the likelier order → share labelled so "
        f"(pairs): {table}",
    ]


def prepared_lines(run: RunDirectory, recipe: Recipe) -> list[str]:
    """What `prepare` has measured of the scorers and margins, in words."""
    facts = read_scorer_facts(run)
    lines = [describe_statistics(name, fact.reference) for name, fact in facts.items()]
    in_std = {
        name: (number, c.reference_std)
        for c in recipe.objective.constraints
        if c.reference_std is not None
        for name, number in c.margins_in_std.items()
    }
    return lines + measured_lines(facts) + describe_margins(in_std)


def measured_lines(facts: dict[str, ScorerFacts]) -> list[str]:
    """Drift of quantized and calibration of implicit scorers, in words."""
    lines = []
    for name, fact in facts.items():
        if fact.quantization_drift is not None:
            lines.append(describe_drift(name, fact.quantization_drift))
        if fact.calibration is not None:
            lines += describe_calibration(name, fact.calibration)
    return lines
