"""`cdpo report`: one self-contained HTML page and its PNGs, drawn from a run's files alone.

Reads recipe.yaml, state.json, exact.json, scorers.json, prompts.parquet, reference.parquet,
rounds/* and front/front.json, loads no model and takes no lock: what a run in progress has finished
is what is shown. Writes only RUN/report/, each file whole; the page embeds its images, so it can be
sent as it is.
"""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

from constrained_dpo.report.cells import at_bound_warning
from constrained_dpo.report.contents import (
    Contents,
    cut_off,
    interval,
    lengths,
    level_words,
    read_contents,
    signed,
)
from constrained_dpo.report.page import TEMPLATES, render_page
from constrained_dpo.report.picture import DrawnPicture
from constrained_dpo.report.run_figures import pictures
from constrained_dpo.report.run_lead import LEAD_ANSWERS, averages, lead_figure, verdict_sentence
from constrained_dpo.report.run_samples import EXTREMES, FIRST_RESPONSES, sample_cards
from constrained_dpo.report.scorer_words import measured_lines
from constrained_dpo.report.status_words import certificate_line
from constrained_dpo.report.verdict_words import MEANING, basis
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from constrained_dpo.run.scorer_facts import read_scorer_facts
from constrained_dpo.run.status import next_step
from data_prep.errors import UserError
from data_prep.files import hash_file, write_atomically


def write_report(run: RunDirectory, number: int | None = None) -> tuple[Path, str]:
    """Writes RUN/report/report.html and its PNGs; returns the page's path and the verdict in one
    sentence.

    number: the round whose policy is shown (None: the last one done). Raises UserError when no
    round has been played, when there is no such round, or when the folder cannot be written.
    """
    contents = read_contents(run, number)
    folder = run.path / "report"
    figures = [picture.drawn() for picture in pictures(contents)]
    images = {name: data for figure in figures for name, data in figure.files.items()}
    page = _render(contents, figures)
    try:
        for name, data in images.items():
            write_atomically(folder / name, data)
        write_atomically(folder / "report.html", page.encode())
        for old in folder.glob("*.png"):  # of a report with other constraints or rounds
            if old.name not in images:
                old.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make it writable or free some space"
        ) from error
    return folder / "report.html", verdict_sentence(contents)


def _render(contents: Contents, figures: list[DrawnPicture]) -> str:
    recipe, state, run = contents.recipe, contents.state, contents.run
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    samples = sample_cards(contents)
    values = {
        "name": recipe.name,
        "run": run.path.name,
        "shown": contents.shown,
        "verdict": contents.record.verdict,
        "sentence": verdict_sentence(contents),
        "lead": lead_figure(contents, figures),
        "answers": samples[:LEAD_ANSWERS],
        "averages": averages(contents),
        "notes": notes(contents),
        "next_step": next_step(run, recipe),
        "problem": recipe.problem.describe().splitlines(),
        "objective_names": recipe.problem.columns,
        "constraints": constraint_rows(contents),
        "rounds": round_rows(contents),
        "reward": recipe.problem.reward,
        "percent": f"{100 * recipe.dual.confidence:g} %",
        "figures": figures,
        "samples": samples,
        "num_pairs": len(contents.before),
        "num_prompts": contents.before.index.get_level_values("prompt_id").nunique(),
        "first_responses": FIRST_RESPONSES,
        "extremes": EXTREMES,
        "left_out": state.left_out,
        "law": contents.record.sampling_law.to_json(),
        "hashes": list(_flat({"recipe": state.recipe_hash, **state.hashes})),
        "sources": list(_sources(contents)),
        "samples_files": [
            contents.name_of(run.reference_file),
            contents.name_of(run.samples_file(contents.shown)),
        ],
        "round_files": contents.round_files,
        "recipe_yaml": run.recipe_file.read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return render_page("report.html.j2", values)


def notes(contents: Contents) -> list[str]:
    """What a reader has to know beside the verdict."""
    record, confidence = contents.record, f"{100 * contents.recipe.dual.confidence:g} %"
    lines = []
    if contents.recipe.problem.constraints:
        lines.append(
            f"{record.verdict.capitalize()}: {MEANING[record.verdict]}. Positive u is room "
            "to spare, negative u is what is missing."
        )
        lines.append(
            f"The intervals are two-sided, {confidence} for each constraint; the verdict is "
            f"one-sided at {confidence} over all constraints "
            "together. Both count prompts, not responses, as independent."
        )
        for line in basis(record.test, contents.recipe.dual.confidence):
            lines.append(f"{line[0].upper()}{line[1:]}.")
    if contents.shown != len(contents.records) - 1:
        lines.append(
            f"Round {contents.shown} was chosen with --round. `best` and `best-dual` do not look "
            "at test prompts; a round chosen for its "
            "test verdict has a lower confidence than stated."
        )
    certificate = certificate_line(contents.records[: contents.shown + 1])
    lines.append(f"{certificate[0].upper()}{certificate[1:]}.")
    for name, value in contents.state.lambda_[-1].items():
        if value >= contents.recipe.dual.max_lambda:
            lines.append(at_bound_warning(name))
    if record.kl is None:
        lines.append(f"KL and objective are not given: {record.kl_reason}.")
    for name, count in record.truncated_scores.items():
        lines.append(
            f"The scorer of {name} read only the part of {count} texts that fits its window."
        )
    if unlabelled := record.unlabelled_prompts:
        lines.append(
            f"{unlabelled} prompts had nothing to compare and no part in this round's fit."
        )
    facts = measured_lines(read_scorer_facts(contents.run))
    lines += [f"{line[0].upper()}{line[1:]}." for line in facts]
    exact, optimum = record.exact_on("test"), contents.optimum_on("test")
    if exact and optimum and optimum.has_beta_of(exact):
        here, best, start = (signed(v.objective) for v in (exact, optimum, optimum.reference))
        share = optimum.share_closed(exact)
        way = "" if share is None else f", {100 * share:.0f} % of the way".replace("-", "−")
        lines.append(
            f"Every response of this world is listed, and so are exact objectives: π_ref {start}, "
            f"this policy {here}, optimum {best}{way}."
        )
    return lines


def constraint_rows(contents: Contents) -> list[dict[str, str]]:
    """Of every constraint, on the test prompts: the required level, where π_ref is, what was
    reached, u, verdict."""
    test, rows = contents.record.test, []
    reference = contents.reference_means
    for c in contents.recipe.problem.constraints:
        reached = test.utilities[c.name]
        rows.append(
            {
                "name": c.name,
                "required": level_words(c),
                "reference": signed(reference[c.name]),
                "level": signed(reached - test.u[c.name]),
                "reached": signed(reached),
                "u": interval(test, c.name),
                "verdict": test.verdicts[c.name],
                "lambda": f"{contents.record.policy_lambda[c.name]:.4f}",
            }
        )
    return rows


def round_rows(contents: Contents) -> list[dict]:
    """Of π_ref and every round: values by constraint, and those of the policy on the test
    prompts."""
    problem, reference = contents.recipe.problem, contents.reference
    means = contents.reference_means
    levels = problem.levels(means)
    rows = [
        {
            "round": "π_ref",
            "shown": False,
            "reward": signed(means[problem.reward]),
            "kl": signed(0.0),
            "objective": signed(means[problem.reward]),
            "gap": "",
            "residual": "",
            "length": f"{lengths(reference).mean():.1f}",
            "cut": f"{100 * cut_off(reference):.0f} %",
            "constraints": [
                {
                    "name": n,
                    "lambda": "",
                    "next": "",
                    "dual": "",
                    "test": signed(means[n] - levels[n]),
                    "verdict": "",
                }
                for n in problem.names
            ],
        }
    ]
    for record in contents.records:
        test = record.test
        rows.append(
            {
                "round": record.round,
                "shown": record.round == contents.shown,
                "reward": signed(test.reward),
                "kl": signed(test.kl),
                "gap": _gap(record),
                "residual": signed(record.residual),
                "objective": signed(test.objective),
                "length": f"{test.mean_length:.1f}",
                "cut": f"{100 * test.cut_off_fraction:.0f} %",
                "constraints": [
                    {
                        "name": n,
                        "lambda": f"{record.lambda_[n]:.4f}",
                        "next": f"{record.lambda_next[n]:.4f}",
                        "dual": interval(record, n),
                        "test": interval(test, n),
                        "verdict": test.verdicts[n],
                    }
                    for n in problem.names
                ],
            }
        )
    return rows


def _gap(record: RoundRecord) -> str:
    """The Lagrangian gap with twice its standard error, or a dash where there is none."""
    if record.lagrangian_gap is None or record.lagrangian_gap_se is None:
        return "–"
    return f"{record.lagrangian_gap:.3f} ± {2 * record.lagrangian_gap_se:.3f}"


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested hashes; an empty mapping is said to be empty."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value == {} else str(value)


def _sources(contents: Contents) -> Iterator[tuple[str, str]]:
    """Every file that the page was drawn from, with the first 16 digits of its SHA-256."""
    run = contents.run
    files = [
        run.recipe_file,
        run.state_file,
        run.scorers_file,
        run.prompts_file,
        run.reference_file,
        run.samples_file(contents.shown),
    ]
    files += [run.exact_file] if contents.optimum else []
    files += [run.front_file] if contents.front else []
    for path in [*files, *map(run.round_file, range(len(contents.records)))]:
        yield contents.name_of(path), hash_file(path)[:16]
