"""What `cdpo check` prints."""

from rich.console import Console
from rich.table import Table

from constrained_dpo.progress import duration
from constrained_dpo.report.words import describe_answers
from constrained_dpo.run.scorer_facts import describe_drift, describe_margins, describe_statistics
from data_prep.scorers.calibration import describe_calibration


def print_check(console: Console, report: dict) -> None:
    """What `check_recipe` found, in words and two tables."""
    if "prompts" in report:
        fit, dual, test = (report["prompts"].get(split, 0) for split in ("fit", "dual", "test"))
        counts = f"{fit + dual} to fit on, {dual} of them dual; {test} test (split by hash)"
        console.print(
            f"prompts: {counts}; left out: "
            f"{', '.join(f'{n} {why}' for why, n in report['left_out'].items())}"
        )
    if "dataset" in report:
        console.print(describe_answers(report["dataset"]))
    if "lengths" in report:
        lengths = report["lengths"]
        total = lengths["longest_prompt"] + lengths["max_new_tokens"]
        console.print(
            f"lengths in tokens: longest prompt {lengths['longest_prompt']} + max_new_tokens "
            f"{lengths['max_new_tokens']} = {total}; "
            f"fit.max_length {lengths['max_length']}, the policy's window "
            f"{lengths['policy_window'] or 'not stated'}"
        )
        for name, own in lengths["scorers"].items():
            cut = ", longer texts are cut" if own["truncate"] else ""
            console.print(
                f"  scorer of {name}: longest prompt {own['longest_prompt']} of its tokens, "
                f"window {own['window']}{cut}"
            )
        console.print(f"  a prompt as the policy reads it: {lengths['example']!r}")
    if "policy" in report:
        policy = report["policy"]
        console.print(
            f"policy: {policy['model']}, {policy['quantization']}, fingerprint "
            f"{policy['fingerprint']}"
        )
        if policy["overridden_generation"]:
            console.print(
                "  sampling ignores the checkpoint's own generation settings: "
                f"{policy['overridden_generation']}"
            )
    for name, found in report["scorers"].items():
        scores = (
            ""
            if found["polite"] is None
            else f"polite answer {found['polite']:+.3g}, rude answer {found['rude']:+.3g}: "
        )
        options = f", {found['options']}" if found["options"] else ""
        console.print(f"scorer of {name} ({found['type']}{options}): {scores}{found['direction']}")
        if "quantization_drift" in found:
            console.print(f"  {describe_drift(name, found['quantization_drift'])}")
        for note in found["notes"]:
            console.print(f"  {note}")
    for line in report["golden"]:
        console.print(line)
    if "sampler" in report:
        sampler = report["sampler"]
        law = (
            "no log-probabilities"
            if not sampler["rows"]
            else f"{sampler['kl']:.2g} nats from the policy over {sampler['rows']} responses"
        )
        again = (
            f", {sampler['retokenized']} responses tokenized again"
            if sampler["retokenized"]
            else ""
        )
        console.print(f"sampling server: {sampler['fingerprint']}, {law}{again}")
    if "pilot" in report:
        _print_pilot(console, report["pilot"])
    for line in report["warnings"]:
        console.print(f"warning: {line}")
    for line in report["not_checked"]:
        console.print(f"not checked: {line}")
    console.print(
        "the recipe is valid" + (" as far as it was checked" if report["not_checked"] else "")
    )


def _gib(value: float) -> str:
    return f"{value:.1f} GiB" if value >= 1 else f"{1024 * value:.0f} MiB"


def _print_pilot(console: Console, pilot: dict) -> None:
    console.print(
        f"pilot: {pilot['prompts']} dual prompts × {pilot['responses_per_prompt']} responses of "
        "π_ref, "
        f"{100 * pilot['cut_off_fraction']:.0f} % cut off; one of them: {pilot['example'][:200]!r}"
    )
    for line in [
        describe_statistics(name, facts) for name, facts in pilot["scores"].items()
    ] + describe_margins(pilot["margins"]):
        console.print(line)
    if pilot["precision"]:
        table = Table(title="expected standard error of u, in score units", title_justify="left")
        for column in (
            "constraint",
            "std within a prompt",
            "std between prompts",
            "dual",
            "test",
            "target",
            "prompts needed",
        ):
            table.add_column(column, justify="left" if column == "constraint" else "right")
        for name, row in pilot["precision"].items():
            numbers = [
                row["std_within"],
                row["std_between"],
                row["se"]["dual"],
                row["se"]["test"],
                row["target_se"],
            ]
            needed = "–" if row["prompts_needed"] is None else str(row["prompts_needed"])
            table.add_row(name, *("–" if v is None else f"{v:.3g}" for v in numbers), needed)
        console.print(table)
        smallest = ", ".join(
            f"|u| > {2 * row['se']['test']:.2g} for {name}"
            for name, row in pilot["precision"].items()
        )
        console.print(
            f"these test prompts can decide about {smallest}; smaller slacks will mostly stay "
            "undecided"
        )
    for name, record in pilot["calibrations"].items():
        for line in describe_calibration(name, record):
            console.print(line)
    for line in pilot["scale"]["words"]:
        console.print(line)
    seconds = pilot["seconds"]
    console.print(
        f"expected time: prepare {duration(seconds['prepare'])}; each round: fit "
        f"{duration(seconds['fit'])}, "
        f"rescore {duration(seconds['rescore'])}; the whole run {duration(seconds['run'])}"
    )
    console.print(
        f"memory: {_gib(pilot['peak_gib'])} at the pilot's peak (on a CPU with the libraries' own "
        "0.5 to 1 GiB)"
    )
