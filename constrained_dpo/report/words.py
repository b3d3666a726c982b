"""What a person reads on the terminal: a round in a few lines, its tables, where a run stands.

Every number comes from round.json, state.json, exact.json or the record that is printed.
"""

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from constrained_dpo.dual.exact import ExactOptimum
from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.evaluation.record import Evaluation
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.report.cells import at_bound_warning, number_cell, slack_cell, verdict_cell
from constrained_dpo.report.trial_words import trial_lines, trial_table
from constrained_dpo.report.verdict_words import MEANING, basis
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord, read_optimum
from data_prep.prompts.messages import last_user_text
from data_prep.readers.tables import read_parquet

EMBEDDED_WORLD = (
    "The embedded world: a small model, trained on the spot, answers requests such as `kid open "
    "safe` in at most three words. The forceful answer helps most and harms most. Every answer is "
    "listed, so the best policy is known exactly."
)

SHOWN_CHARACTERS = 60
"""Of a prompt or response in the few lines about a round."""


def round_lines(run: RunDirectory, record: RoundRecord) -> list[str]:
    """Say in a few lines what a round came to."""
    recipe = run.recipe()
    problem, test, confidence = recipe.problem, record.test, recipe.dual.confidence
    columns = ["prompt_id", "split", "response", problem.reward]
    tables = [
        read_parquet(f, columns) for f in (run.reference_file, run.samples_file(record.round))
    ]
    before, after = (table[table["split"] == "test"] for table in tables)
    start = float(before.groupby("prompt_id")[problem.reward].mean().mean())
    lines = [("round", f"{record.round}, judged on {test.num_prompts} prompts never trained on")]
    for constraint in problem.constraints:
        lines.append(("required", _required(constraint)))
        lines.append(("measured", _measured(constraint, test, confidence)))
    if problem.constraints:
        lines.append(("verdict", f"{record.verdict}: {MEANING[record.verdict]}"))
        lines += [("", words) for words in basis(test, confidence)]
    change = test.reward - start
    words = "gained" if change >= 0 else "paid"
    lines.append(
        (
            "reward",
            f"{problem.reward} {start:+.2f} → {test.reward:+.2f} ({words} {abs(change):.2f})",
        )
    )
    if test.kl is not None:
        lines.append(("distance", f"{test.kl:.2f} nats from the reference policy (KL)"))
    lines += _optimum_lines(record, read_optimum(run))
    lines.append(("example", _example(run, before, after)))
    if record.lambda_:
        lines.append(("weight λ", _moves(record)))
    lines += trial_lines(record)
    for name in record.lambda_next:
        if record.lambda_next[name] >= recipe.dual.max_lambda:
            lines.append(("warning", at_bound_warning(name).removeprefix("warning: ")))
    left = recipe.dual.rounds - record.round - 1
    rounds = f"plays the {left} rounds that are left" if left > 1 else "plays the last round"
    more = f"cdpo round {run.path} (plays another; the recipe's are done)"
    lines.append(("next", f"cdpo run {run.path} ({rounds})" if left > 0 else more))
    lines.append(("more", f"cdpo status {run.path} --full; cdpo report {run.path}"))
    return [f"{head:<9} {text}" for head, text in lines]


def _moves(record: RoundRecord) -> str:
    moves = [f"{n} {v:.3f} → {record.lambda_next[n]:.3f}" for n, v in record.lambda_.items()]
    count = "" if record.trials is None else f" (by {len(record.trials)} trials)"
    return ", ".join(moves) + count


def _required(constraint: Constraint) -> str:
    if constraint.margin is not None:
        return f"{constraint.name} at least {constraint.margin:.2f} above the reference"
    return f"{constraint.name} at least {constraint.threshold:.2f}"


def _measured(constraint: Constraint, test: Measurement, confidence: float) -> str:
    name, level = constraint.name, constraint.margin
    shift = level if level is not None else constraint.threshold or 0.0
    values = (test.u[name], test.u_ci_low[name], test.u_ci_high[name])
    value, low, high = (u + shift for u in values)
    above = " above it" if level is not None else ""
    return f"{name} {value:+.2f}{above}, {100 * confidence:g} % interval {low:+.2f} to {high:+.2f}"


def _optimum_lines(
    record: RoundRecord, optimum: dict[str, ExactOptimum] | None
) -> list[tuple[str, str]]:
    best = (optimum or {}).get("test") or (optimum or {}).get("all")
    exact = record.exact_on("test")
    share = None if best is None or exact is None else best.share_closed(exact)
    if share is None:
        return []
    return [("optimum", f"{100 * share:.0f} % of the way to the best policy that meets the margin")]


def _example(run: RunDirectory, before: pd.DataFrame, after: pd.DataFrame) -> str:
    """One prompt's first answers before and after: the first that differ."""
    prompts = run.prompts().set_index("prompt_id")["prompt"]
    first = [
        t.drop_duplicates("prompt_id").set_index("prompt_id")["response"] for t in (before, after)
    ]
    differing = [pid for pid in first[0].index if first[0][pid] != first[1][pid]]
    pid = (differing or list(first[0].index))[0]
    prompt = last_user_text(prompts[pid], run.recipe().prompts.format)
    prompt, one, other = (_short(text) for text in (prompt, first[0][pid], first[1][pid]))
    return f"“{prompt}”: “{one}” → “{other}”"


def _short(text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def print_round(
    console: Console, run: RunDirectory, record: RoundRecord, stopped: str | None
) -> None:
    """Print what a round came to, in lines that a newcomer can follow.

    stopped: why no further round follows.
    """
    for line in round_lines(run, record):
        console.print(line, soft_wrap=True)
    if stopped is not None:
        console.print(stopped, soft_wrap=True)


def print_tables(console: Console, run: RunDirectory, record: RoundRecord) -> None:
    """Print a round's tables: λ and u by constraint, then reward, KL and objective, then claims."""
    recipe, optimum = run.recipe(), read_optimum(run)
    console.print(_constraint_table(record, recipe.problem, optimum, recipe.dual.confidence))
    if record.trials:
        console.print(trial_table(record.trials))
    console.print(_value_table(run, record, recipe.problem, optimum))
    if record.kl is None:
        console.print(f"KL and objective are null: {record.kl_reason}.")
    meaning = f" ({MEANING[record.verdict]})"
    console.print(
        Text.assemble("verdict on the test prompts: ", verdict_cell(record.verdict), meaning)
    )
    for line in basis(record.test, recipe.dual.confidence):
        console.print(line, soft_wrap=True)
    for split, policy in (record.exact or {}).items():
        share = optimum[split].share_closed(policy) if optimum else None
        if share is not None:
            console.print(
                f"exact objective on {split} prompts: {100 * share:.0f} % of the way from π_ref to "
                "the optimum P*"
            )


def _constraint_table(
    record: RoundRecord,
    problem: ConstrainedProblem,
    optimum: dict[str, ExactOptimum] | None,
    confidence: float,
) -> Table:
    percent = f"{100 * confidence:g} %"
    table = Table("constraint", title=f"round {record.round}", title_justify="left")
    for column in ("λ before", "λ after", f"u on dual prompts [{percent}]"):
        table.add_column(column, justify="right")
    table.add_column(f"u on test prompts [{percent}]", justify="right")
    table.add_column("verdict", justify="right")
    for name in problem.names:
        before, after = record.lambda_[name], record.lambda_next[name]
        slacks = slack_cell(record, name), slack_cell(record.test, name)
        word = verdict_cell(record.test.verdicts[name])
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", *slacks, word)
        for split, policy in (record.exact or {}).items():
            if optimum:
                value, best = f"{policy.u[name]:+.3f}", f"{optimum[split].lambda_[name]:.4f}"
                cells = ["", value] if split == "test" else [value, ""]
                table.add_row(f"  exact ({split})", "", f"λ* {best}", *cells, "", style="dim")
    return table


def _value_table(
    run: RunDirectory,
    record: RoundRecord,
    problem: ConstrainedProblem,
    optimum: dict[str, ExactOptimum] | None,
) -> Table:
    columns = ["prompt_id", "split", "token_ids", "ended", problem.reward]
    reference = read_parquet(run.reference_file, columns=columns)
    reward = f"E[{problem.reward}]"
    table = Table("")
    for column in (reward, "KL (nats)", f"objective {reward} − β KL", "mean tokens", "cut off"):
        table.add_column(column, justify="right")
    for split, measured in (("dual", record), ("test", record.test)):
        table.add_row(
            f"{split} prompts",
            f"{measured.reward:+.3f} ± {measured.reward_se:.3f}",
            number_cell(measured.kl),
            number_cell(measured.objective),
            f"{measured.mean_length:.1f}",
            f"{100 * measured.cut_off_fraction:.0f} %",
        )
        base = reference[reference["split"] == split]
        start = float(base.groupby("prompt_id")[problem.reward].mean().mean())
        length = f"{base['token_ids'].map(len).mean():.1f}"
        cut_off = f"{100 * (~base['ended'].astype(bool)).mean():.0f} %"
        exact, best = (record.exact or {}).get(split), (optimum or {}).get(split)
        rows = [(f"  exact ({split})", exact)]
        rows += (
            [("  exact π_ref", best.reference), ("  exact optimum P*", best.optimal)]
            if best
            else []
        )
        table.add_row("  π_ref", number_cell(start), "", "", length, cut_off, style="dim")
        for label, policy in rows:
            if policy is not None:
                cells = (policy.reward, policy.kl, policy.objective)
                table.add_row(label, *map(number_cell, cells), "", "", style="dim")
    return table


def print_samples(console: Console, run: RunDirectory, number: int, count: int = 5) -> None:
    """Print the first response to a few test prompts under π_ref and under a round's policy."""
    recipe = run.recipe()
    chat, columns = recipe.prompts.format, recipe.problem.columns
    prompts = run.prompts()
    prompts = prompts[prompts["split"] == "test"].head(count)
    before, after = (
        read_parquet(file).drop_duplicates("prompt_id").set_index("prompt_id")
        for file in (run.reference_file, run.samples_file(number))
    )
    title = (
        "one answer each, before and after (test prompts; independent draws, so single changes "
        "are partly luck)"
    )
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("prompt", "reference policy", "this policy"):
        table.add_column(column, overflow="fold")
    for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True):
        cells = []
        for row in (before.loc[pid], after.loc[pid]):
            scores = ", ".join(f"{n} {row[n]:+.2f}" for n in columns if pd.notna(row[n]))
            cells.append(f"{row['response'] or '(nothing)'}\n({scores})")
        table.add_row(last_user_text(prompt, chat), *cells)
    console.print(table)


def print_evaluation(console: Console, record: Evaluation, recipe: Recipe) -> None:
    """Print every score before and after, u and verdict of the constraints, KL and lengths."""
    problem, percent = recipe.problem, f"{100 * recipe.dual.confidence:g} %"
    title = f"{record.key}: {record.num_prompts} prompts, {record.num_samples} responses"
    table = Table("score", title=title, title_justify="left")
    for column in ("π_ref", "policy", f"difference [{percent}]", f"u [{percent}]", "verdict"):
        table.add_column(column, justify="right")
    for name, row in record.change.items():
        constrained = name in problem.names
        slack, word = (slack_cell(record, name), record.verdicts[name]) if constrained else ("", "")
        change = f"{row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        table.add_row(name, f"{row.reference:+.3f}", f"{row.policy:+.3f}", change, slack, word)
    console.print(table)
    console.print(
        f"KL {number_cell(record.kl)} nats; mean length {record.mean_length:.1f} tokens, "
        f"{100 * record.cut_off_fraction:.0f} % cut off"
    )
    if record.kl is None:
        console.print(f"KL and objective are null: {record.kl_reason}.")
    if record.trained_prompts:
        console.print(
            f"warning: {record.trained_prompts} of the {record.num_prompts} prompts were fitted "
            "on: this is no measurement on unseen prompts"
        )
        console.print(f"verdict on these prompts: {record.verdict}")
    else:
        console.print(f"verdict: {record.verdict} ({MEANING[record.verdict]})")
        for line in basis(record, recipe.dual.confidence):
            console.print(line, soft_wrap=True)
