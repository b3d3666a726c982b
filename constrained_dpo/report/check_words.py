"""What `cdpo check` prints."""

from rich.console import Console
from rich.table import Table

from constrained_dpo.check.check import CheckReport, Lengths
from constrained_dpo.check.pilot import Pilot
from constrained_dpo.check.precision import Precision
from constrained_dpo.check.scorers import CheckedScorer
from constrained_dpo.estimates.score_scale import LARGE_SHARE, ScoreScale
from constrained_dpo.progress import duration
from constrained_dpo.recipe.fit import FitSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.report.scorer_words import (
    describe_calibration,
    describe_drift,
    describe_margins,
    describe_statistics,
)
from constrained_dpo.report.status_words import describe_answers

NEARLY_ALL = 0.9
"""Share of tied pairs from which a recipe is advised."""


def print_check(console: Console, report: CheckReport, recipe: Recipe) -> None:
    """Print a check in words and two tables."""
    if report.prompts is not None:
        fit, dual, test = (report.prompts.get(split, 0) for split in ("fit", "dual", "test"))
        left_out = ", ".join(f"{n} {reason}" for reason, n in report.left_out.items())
        console.print(
            f"prompts: {fit + dual} to fit on, {dual} of them dual; {test} test (split by hash); "
            f"left out: {left_out}"
        )
    if report.dataset is not None:
        console.print(describe_answers(report.dataset))
    if report.lengths is not None:
        _print_lengths(console, report.lengths)
    if report.policy is not None:
        policy = report.policy
        console.print(
            f"policy: {policy['model']}, {policy['quantization']}, fingerprint "
            f"{policy['fingerprint']}"
        )
        if policy["overridden_generation"]:
            console.print(
                "  sampling ignores the checkpoint's own generation settings: "
                f"{policy['overridden_generation']}"
            )
    for line in report.choices:
        console.print(f"chosen: {line}", soft_wrap=True)
    for name, scorer in report.scorers.items():
        _print_scorer(console, name, scorer)
    for line in report.golden:
        console.print(line)
    if report.sampler is not None:
        console.print(_sampler_line(report.sampler))
    if report.pilot is not None:
        _print_pilot(console, report.pilot, recipe)
    for line in report.warnings:
        console.print(f"warning: {line}")
    for line in report.not_checked:
        console.print(f"not checked: {line}")
    limits = " as far as it was checked" if report.not_checked else ""
    console.print(f"the recipe is valid{limits}")


def _print_lengths(console: Console, lengths: Lengths) -> None:
    total = lengths.longest_prompt + lengths.max_new_tokens
    console.print(
        f"lengths in tokens: longest prompt {lengths.longest_prompt} + max_new_tokens "
        f"{lengths.max_new_tokens} = {total}; fit.max_length {lengths.max_length}, the policy's "
        f"window {lengths.policy_window or 'not stated'}"
    )
    for name, window in lengths.scorers.items():
        cut = ", longer texts are cut" if window.truncate else ""
        console.print(
            f"  scorer of {name}: longest prompt {window.longest_prompt} of its tokens, window "
            f"{window.window}{cut}"
        )
    console.print(f"  a prompt as the policy reads it: {lengths.example!r}")


def _print_scorer(console: Console, name: str, scorer: CheckedScorer) -> None:
    scores = ""
    if scorer.polite is not None:
        scores = f"polite answer {scorer.polite:+.3g}, rude answer {scorer.rude:+.3g}: "
    options = f", {scorer.options}" if scorer.options else ""
    console.print(f"scorer of {name} ({scorer.type}{options}): {scores}{scorer.direction}")
    if scorer.quantization_drift is not None:
        console.print(f"  {describe_drift(name, scorer.quantization_drift)}")
    for note in scorer.notes:
        console.print(f"  {note}")


def _sampler_line(sampler: dict) -> str:
    law = "no log-probabilities"
    if sampler["rows"]:
        law = f"{sampler['kl']:.2g} nats from the policy over {sampler['rows']} responses"
    again = sampler["retokenized"]
    words = f", {again} responses tokenized again" if again else ""
    if sampler["eos_z"] is not None and sampler["surprisal_z"] is not None:
        words += (
            f", draws z = {sampler['eos_z']:+.1f} (EOS), {sampler['surprisal_z']:+.1f} (tokens)"
        )
    if (cost := sampler["cost"]) is not None:
        words += (
            f"; {cost['server_seconds']:.1f} s there, {cost['forward_seconds']:.1f} s in the "
            "policy's forward here"
        )
    places = ", ".join(sampler["servers"])
    return f"sampling server: {sampler['fingerprint']} at {places}, {law}{words}"


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:.0f} MiB"


def _print_pilot(console: Console, pilot: Pilot, recipe: Recipe) -> None:
    console.print(
        f"pilot: {pilot.prompts} dual prompts × {pilot.responses_per_prompt} responses of π_ref, "
        f"{100 * pilot.cut_off_fraction:.0f} % cut off; one of them: {pilot.example[:200]!r}"
    )
    if pilot.bounded:
        console.print(
            "  fewer than usual, so that the pilot takes about a minute: precision and times are "
            "rough, and the run's memory may be larger"
        )
    for name, facts in pilot.scores.items():
        console.print(describe_statistics(name, facts))
    for line in describe_margins(pilot.margins):
        console.print(line)
    if pilot.precision:
        console.print(_precision_table(pilot.precision))
        smallest = ", ".join(
            f"|u| > {2 * row.se['test']:.2g} for {name}" for name, row in pilot.precision.items()
        )
        console.print(
            f"these test prompts can decide about {smallest}; smaller slacks will mostly stay "
            "undecided"
        )
    for name, record in pilot.calibrations.items():
        for line in describe_calibration(name, record):
            console.print(line)
    for line in describe_scale(pilot.scale, recipe.objective.beta, recipe.fit):
        console.print(line)
    seconds = {phase: duration(value) for phase, value in pilot.seconds.items()}
    console.print(
        f"expected time: prepare {seconds['prepare']}; each round: fit {seconds['fit']}, rescore "
        f"{seconds['rescore']}; the whole run {seconds['run']}"
    )
    console.print(
        f"memory: {_gib(pilot.peak_gib)} at the pilot's peak (on a CPU with the libraries' own 0.5 "
        "to 1 GiB)"
    )


def _precision_table(precision: dict[str, Precision]) -> Table:
    table = Table(title="expected standard error of u, in score units", title_justify="left")
    head = ["constraint", "std within a prompt", "std between prompts", "dual", "test", "target"]
    for column in (*head, "prompts needed"):
        table.add_column(column, justify="left" if column == "constraint" else "right")
    for name, row in precision.items():
        errors = (row.std_within, row.std_between, row.se["dual"], row.se["test"], row.target_se)
        cells = ("–" if value is None else f"{value:.3g}" for value in errors)
        table.add_row(name, *cells, "–" if row.prompts_needed is None else str(row.prompts_needed))
    return table


def describe_scale(scale: ScoreScale, beta: float, fit: FitSettings) -> list[str]:
    """Say the scale of the scores, and where it is unusual, what follows for the fit."""
    at = ", ".join(f"{name} {value:.3g}" for name, value in scale.lambda_.items())
    where = scale.lambda_is + (f": {at}" if any(scale.lambda_.values()) else "")
    std = scale.std_within
    if scale.beta_over_std is None:
        return [
            f"scores (at {where}): all responses of a prompt score the same, so no pair says "
            "anything; look at the scorers"
        ]
    lines = [
        f"scores (at {where}): s = r + λ·g varies by {std:.3g} (std within a prompt), β/std "
        f"{scale.beta_over_std:.3g}; {100 * scale.saturated:.0f} % of pairs saturated (P > 0.99), "
        f"{100 * scale.tied:.0f} % nearly tied (P < 0.6)"
    ]
    if scale.saturated > LARGE_SHARE and fit.loss == "logistic":
        lines.append(
            "  a saturated pair says which answer is better and hardly by how much. fit.loss: "
            "listwise with fit.group_size: 8 keeps the scale; with a higher learning rate and "
            "mostly recent samples (recipes/quickstart_std10.yaml) it came nearest to the optimum "
            "in docs/benchmarks.md. Or all scores, margins, thresholds and β divided by one number "
            f"(by {std:.2g}: std 1, β {beta / std:.2g}): the same problem with softer labels, "
            "which was not measured"
        )
    if scale.tied > NEARLY_ALL:
        drawn = "" if fit.labels in ("soft", "given") else f"; fit.labels is {fit.labels} here"
        lines.append(
            "  nearly every target is close to 1/2: a label that is drawn or rounded (fit.labels: "
            f"bernoulli, argmax) would be mostly noise, soft keeps the differences{drawn}"
        )
    return lines
