"""What a person reads: phases as they pass, the table of a round, the status of a run, the findings
of a check.

Every number comes from round.json, state.json, exact.json or the check itself.
"""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from constrained_dpo.estimates.certificate import sentence
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.progress import duration
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.selection import violated_on_dual
from data_prep.tables import read_parquet

MEANING = {
    "satisfied": "the utility is above its level on fresh samples of unseen prompts, at the "
    "stated confidence",
    "undecided": "the interval on unseen prompts contains 0: more test prompts or responses would "
    "decide",
    "violated": "the utility is below its level on unseen prompts, at the stated confidence",
}


COLOURS = {
    "satisfied": "green",
    "undecided": "yellow",
    "violated": "red",
}  # rich drops them under NO_COLOR and in files and pipes


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _verdict(word: str) -> Text:
    return Text(word, style=COLOURS[word])


def print_round(
    console: Console,
    run: RunDirectory,
    record: dict,
    problem: ConstrainedProblem,
    confidence: float,
) -> None:
    """The table that ends a round: λ before and after, u with its interval, E[r], KL, objective,
    verdict, exact values beside them."""
    exact = record.get("exact")
    optimum = json.loads(run.exact_file.read_text()) if run.exact_file.exists() else None
    percent = f"{100 * confidence:g} %"
    table = Table(title=f"round {record['round']}", title_justify="left")
    for column in (
        "constraint",
        "λ before",
        "λ after",
        f"u on dual prompts [{percent}]",
        f"u on test prompts [{percent}]",
        "verdict",
    ):
        table.add_column(column, justify="left" if column == "constraint" else "right")
    for name in problem.names:
        cells = [name, f"{record['lambda'][name]:.4f}", f"{record['lambda_next'][name]:.4f}"]
        for part in (record, record["test"]):
            cells.append(
                f"{part['u'][name]:+.3f} [{part['u_ci_low'][name]:+.3f}, "
                f"{part['u_ci_high'][name]:+.3f}]"
            )
        table.add_row(*cells, _verdict(record["test"]["verdicts"][name]))
        if exact and optimum:
            for split in exact:
                best = f"{optimum[split]['lambda'][name]:.4f}"
                value = f"{exact[split]['u'][name]:+.3f}"
                shown = ["", value] if split == "test" else [value, ""]
                table.add_row(f"  exact ({split})", "", f"λ* {best}", *shown, "", style="dim")
    console.print(table)

    reference = read_parquet(
        run.reference_file, columns=["prompt_id", "split", "token_ids", "ended", problem.reward]
    )
    values = Table()
    for column in (
        "",
        f"E[{problem.reward}]",
        "KL (nats)",
        f"objective E[{problem.reward}] − β KL",
        "mean tokens",
        "cut off",
    ):
        values.add_column(column, justify="right" if column else "left")
    for split, part in (("dual", record), ("test", record["test"])):
        values.add_row(
            f"{split} prompts",
            f"{part['reward']:+.3f} ± {part['reward_se']:.3f}",
            _number(part["kl"]),
            _number(part["objective"]),
            f"{part['mean_length']:.1f}",
            f"{100 * part['cut_off_fraction']:.0f} %",
        )
        if exact and split in exact:
            e = exact[split]
            values.add_row(
                f"  exact ({split})",
                *(_number(e[k]) for k in ("reward", "kl", "objective")),
                "",
                "",
                style="dim",
            )
        base = reference[reference["split"] == split]
        start = base.groupby("prompt_id")[problem.reward].mean().mean()
        length, cut_off = (
            base["token_ids"].map(len).mean(),
            100 * (~base["ended"].astype(bool)).mean(),
        )
        values.add_row(
            "  π_ref", _number(start), "", "", f"{length:.1f}", f"{cut_off:.0f} %", style="dim"
        )
        if optimum and split in optimum:
            for label, key in (("  exact π_ref", "reference"), ("  exact optimum P*", "optimal")):
                o = optimum[split][key]
                values.add_row(
                    label,
                    *(_number(o[k]) for k in ("reward", "kl", "objective")),
                    "",
                    "",
                    style="dim",
                )
    console.print(values)
    if record["kl"] is None:
        console.print(f"KL and objective are null: {record['kl_reason']}.")
    console.print(
        certificate_line([run.round_record(t) for t in range(record["round"] + 1)], confidence)
    )
    console.print(
        Text.assemble(
            "verdict on the test prompts: ",
            _verdict(record["verdict"]),
            f" ({MEANING[record['verdict']]})",
        )
    )
    if exact and optimum:
        from constrained_dpo.dual.exact import share_of_gap_closed

        shares = {
            split: share_of_gap_closed(values, optimum[split]) for split, values in exact.items()
        }
        said = [
            f"{100 * share:.0f} % on {split} prompts"
            for split, share in shares.items()
            if share == share
        ]
        # with margins so high that P* lies below π_ref's objective there is no such way
        if said:
            console.print(
                f"way from π_ref to the exact optimum P*, in exact objective: {', '.join(said)}"
            )


def certificate_line(records: list[dict], confidence: float) -> str:
    """The certificate of the last of these rounds in a sentence, with what a reader needs to weigh
    it."""
    record = records[-1]
    said = sentence(record, records, not violated_on_dual(record, confidence))
    if record.get("ess") is None:
        return f"certificate (dual prompts): {said}"
    details = f"effective sample size {record['ess']:.1f}"
    if record["residual"] is not None:
        details += f", off-policy residual {record['residual']:.3f}"
    if (exact := (record.get("exact") or {}).get("dual")) and "lagrangian_gap" in exact:
        details += f"; exact distance from the best policy at this λ {exact['lagrangian_gap']:.3f}"
    return f"certificate (dual prompts): {said} ({details})"


def print_samples(
    console: Console, run: RunDirectory, number: int, objectives: list[str], count: int = 5
) -> None:
    """The first response to a few test prompts under π_ref and under the round's policy, with their
    scores."""
    from data_prep.prompts.templates import last_user_text

    chat = run.recipe().prompts.format
    prompts = run.prompts()
    prompts = prompts[prompts["split"] == "test"].head(count)
    before = read_parquet(run.reference_file).drop_duplicates("prompt_id").set_index("prompt_id")
    after = (
        read_parquet(run.samples_file(number)).drop_duplicates("prompt_id").set_index("prompt_id")
    )
    title = (
        "one answer each, before and after (test prompts; independent draws, so single "
        "changes are partly luck)"
    )
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "reference policy", "this policy"):
        table.add_column(column, overflow="fold")
    for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True):
        cells = []
        for row in (before.loc[pid], after.loc[pid]):
            scores = ", ".join(f"{n} {row[n]:+.2f}" for n in objectives)
            cells.append(f"{row['response'] or '(nothing)'}\n({scores})")
        table.add_row(last_user_text(prompt, chat), *cells)
    console.print(table)


def print_evaluation(
    console: Console, record: dict, problem: ConstrainedProblem, confidence: float
) -> None:
    """Every score before and after with its paired difference, u and verdict where it is a
    constraint, then KL and lengths."""
    table = Table(
        title=f"{record['key']}: {record['num_prompts']} prompts, {record['num_samples']} "
        "responses",
        title_justify="left",
    )
    percent = f"{100 * confidence:g} %"
    for column in (
        "score",
        "π_ref",
        "policy",
        f"difference [{percent}]",
        f"u [{percent}]",
        "verdict",
    ):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, row in record["change"].items():
        slack = verdict = ""
        if name in problem.names:
            slack = (
                f"{record['u'][name]:+.3f} [{record['u_ci_low'][name]:+.3f}, "
                f"{record['u_ci_high'][name]:+.3f}]"
            )
            verdict = record["verdicts"][name]
        change = f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        table.add_row(
            name, f"{row['reference']:+.3f}", f"{row['policy']:+.3f}", change, slack, verdict
        )
    console.print(table)
    console.print(
        f"KL {_number(record['kl'])} nats; mean length {record['mean_length']:.1f} tokens, "
        f"{100 * record['cut_off_fraction']:.0f} % cut off"
    )
    if record["kl"] is None:
        console.print(f"KL and objective are null: {record['kl_reason']}.")
    if trained := record["trained_prompts"]:
        console.print(
            f"warning: {trained} of the {record['num_prompts']} prompts were fitted on: this is "
            "no measurement on unseen prompts"
        )
        console.print(f"verdict on these prompts: {record['verdict']}")
    else:
        console.print(f"verdict: {record['verdict']} ({MEANING[record['verdict']]})")


def at_bound_warning(name: str) -> str:
    """What a multiplier at dual.max_lambda means."""
    return (
        f"warning: λ({name}) is at dual.max_lambda: more weight on {name} was not enough to reach "
        "its level; lower the margin or threshold "
        f"of {name}, or give more responses per prompt"
    )


def print_status(console: Console, content: dict[str, object]) -> None:
    console.print(f"{content['name']}\n{content['problem']}")
    if content["rounds"]:
        table = Table()
        for column in (
            "round",
            "λ",
            "u on dual prompts",
            "u on test prompts",
            f"E[{content['reward']}]",
            "KL",
            "objective",
            "gap at λ",
            "verdict on test",
        ):
            table.add_column(column, justify="right")
        for row in content["rounds"]:
            lambdas = "\n".join(f"{n} {v:.4f}" for n, v in row["lambda"].items())
            slacks = [
                "\n".join(
                    f"{v:+.3f} [{part['u_ci_low'][n]:+.3f}, {part['u_ci_high'][n]:+.3f}]"
                    for n, v in part["u"].items()
                )
                for part in (row, row["test"])
            ]
            values = (_number(row[k]) for k in ("reward", "kl", "objective", "lagrangian_gap"))
            table.add_row(str(row["round"]), lambdas, *slacks, *values, _verdict(row["verdict"]))
        console.print(table)
        console.print(content["certificate"])
        chosen = {"best": content["best"], "best-dual": content["best_dual"]}
        said = [
            f"--round {name}: " + ("none qualifies" if number is None else f"round {number}")
            for name, number in chosen.items()
        ]
        console.print("; ".join(said))
    if content["lambda"]:
        console.print(
            "λ for the next round: "
            + ", ".join(f"{n} {v:.4f}" for n, v in content["lambda"].items())
        )
    for name in content["at_max_lambda"]:
        console.print(at_bound_warning(name))
    left_out = {k: v for k, v in content["left_out"].items() if v}
    if left_out:
        console.print("prompts left out: " + ", ".join(f"{v} {k}" for k, v in left_out.items()))
    if content["dataset"]:
        console.print(describe_answers(content["dataset"]))
    console.print(f"next: {content['next']}")
    if content["rounds_left"] and content["seconds_per_round"] is not None:
        console.print(
            f"expected from the rounds so far: {duration(content['seconds_per_round'])} a round, "
            f"{duration(content['seconds_left'])} for the {content['rounds_left']} left"
        )


def describe_answers(counts: dict) -> str:
    """The dataset's responses in the pool, in words."""
    left_out = ", ".join(f"{n} {why}" for why, n in counts["left_out"].items() if n) or "none"
    return (
        f"the dataset's responses: {counts['responses']} to {counts['prompts']} prompts "
        f"({counts['prompts_without']} without); "
        f"left out: {left_out}"
    )
