"""The report as a reader gets it: real runs (exact maximizer as the learner), the page parsed, its
numbers against round.json."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.problem import ConstrainedProblem, Constraint
from constrained_dpo.report.contents import read_contents, signed
from constrained_dpo.report.page import MAX_CHARACTERS
from constrained_dpo.report.run_page import (
    EXTREMES,
    choose_samples,
    notes,
    verdict_sentence,
    write_report,
)
from data_prep.errors import UserError
from data_prep.tables import read_parquet, write_parquet
from tests.helpers.cli import cdpo
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world


def reported(run, number=None) -> tuple[Page, str]:
    path, _ = write_report(run, number)
    html = path.read_text()
    return Page(html), html


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """3 constraints, 12 rounds."""
    world = random_world(3, 3, prompts=24, responses=30, margin=0.25)
    run, recipe, learner = make_run(
        tmp_path_factory.mktemp("long") / "run", world, ["dual.responses_per_prompt=8"]
    )
    play(run, recipe, learner, 12)
    return run


@pytest.fixture(scope="module")
def long_page(long_run):
    return reported(long_run)


def test_the_page_is_self_contained_and_every_image_names_its_files(long_run, long_page):
    page, html = long_page
    assert not re.search(r"https?:", html) and not page.of("link") and not page.of("iframe")
    assert len(page.scripts) == 1 and all("src" not in attrs for attrs in page.of("script"))
    images = page.of("img") + page.of("source")
    assert all(
        attrs.get("src", attrs.get("srcset")).startswith("data:image/png;base64,")
        for attrs in images
    )
    assert (
        len(page.of("img"))
        == len(page.of("source"))
        == len(page.of("figure"))
        == len(page.captions)
        == 1 + 3 + 3 + 1 + 4 + 1
    )
    assert all(attrs["alt"] for attrs in page.of("img"))
    for caption in page.captions:
        drawn, saved = re.search(r"Drawn from (.*); saved as (.*)\.$", caption).groups()
        names = re.split(r", | to ", drawn)
        assert names and all((long_run.path / name).is_file() for name in names), caption
        assert (long_run.path / saved).read_bytes().startswith(b"\x89PNG")
    assert len(list((long_run.path / "report").glob("*.png"))) == 2 * len(page.captions)


def test_the_table_of_rounds_holds_the_numbers_of_round_json(long_run, long_page):
    page, _ = long_page
    rows = [[cell.strip() for cell in row] for row in page.rows[1:]]
    assert len(rows) == 13 * 3
    for number in range(12):
        record = long_run.round_record(number)
        block = rows[3 * (number + 1) : 3 * (number + 2)]
        test = record["test"]
        assert block[0].pop(0) == str(number)
        assert block[0][6:9] == [
            signed(test["reward"]),
            signed(test["kl"]),
            signed(test["objective"]),
        ]
        for name, cells in zip(["g0", "g1", "g2"], block, strict=True):
            expected = [name, f"{record['lambda'][name]:.4f}", f"{record['lambda_next'][name]:.4f}"]
            for part in (record, test):
                low, high = (signed(part[key][name]) for key in ("u_ci_low", "u_ci_high"))
                expected.append(f"{signed(part['u'][name])} [{low}, {high}]")
            assert cells[:6] == [*expected, test["verdicts"][name]]
    reference = read_parquet(long_run.reference_file)
    means = reference[reference["split"] == "test"].groupby("prompt_id")[["r"]].mean().mean()
    assert rows[0][7] == signed(means["r"]) and rows[0][5] == signed(-0.25)


def test_verdicts_are_said_in_words(long_run):
    contents = read_contents(long_run, 0)
    test, sentence = contents.record["test"], verdict_sentence(contents)
    assert set(test["verdicts"].values()) == {"violated"}
    assert sentence.startswith(
        "After round 0, on 12 unseen test prompts and at 95 % confidence over all 3 constraints "
        "together, none satis"
    )
    assert (
        "g1 (at least 0.25 above the reference policy) is violated, u = "
        f"{signed(test['u']['g1'])} [" in sentence
    )
    assert any("Round 0 was chosen with --round" in note for note in notes(contents))
    assert not any("--round" in note for note in notes(read_contents(long_run)))


@pytest.mark.parametrize(
    ("margin", "verdict"), [(-3.0, "satisfied"), (9.0, "violated"), (0.0, "undecided")]
)
def test_the_verdict_of_one_constraint(tmp_path, margin, verdict):
    world = random_world(
        1, 1, prompts=12, responses=10, margin=margin, beta=1e6
    )  # β so large that the policy stays at π_ref
    run, recipe, learner = make_run(tmp_path / "run", world, ["dual.responses_per_prompt=8"])
    play(run, recipe, learner, 1)
    contents = read_contents(run)
    start = (
        "After round 0, on 6 unseen test prompts and at 95 % confidence, g0 (at least "
        f"{margin:g} above the reference policy)"
    )
    assert verdict_sentence(contents).startswith(f"{start} is {verdict}, u = ")
    assert notes(contents)[0].startswith(f"{verdict.capitalize()}: ")


def test_the_verdict_stands_on_top_and_a_second_report_replaces_the_first(tmp_path):
    run, recipe, learner = make_run(
        tmp_path / "run",
        random_world(1, 1, prompts=12, responses=10),
        ["dual.responses_per_prompt=8"],
    )
    play(run, recipe, learner, 1)
    path, sentence = write_report(run)
    verdict = run.round_record(0)["verdict"]
    assert (
        f'<div class="verdict {verdict}"><p><strong>{verdict}</strong>{sentence}</p></div>'
        in path.read_text()
    )
    first = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    (path.parent / "u-4-gone.png").write_bytes(b"of an earlier report")
    write_report(run)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == first


def test_model_output_prompts_and_names_are_text_never_markup(tmp_path):
    world = random_world(2, 1, prompts=12, responses=10)
    problem = ConstrainedProblem(
        "r", 0.5, (Constraint("length", margin=0.4),)
    )  # may be called as the length histogram is
    world = TabularWorld(problem, world.ref_logp, world.reward, {"length": world.utilities["g0"]})
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.responses_per_prompt=6", "name=</title><b>bold</b>"]
    )
    learner.prompts["prompt"] = HOSTILE
    play(run, recipe, learner, 1)
    for path in (run.samples_file(0), run.reference_file):
        table = read_parquet(path)
        write_parquet(
            table.assign(response=[HOSTILE, "x" * (MAX_CHARACTERS + 5), ""] * (len(table) // 3)),
            path,
        )
    page, html = reported(run)
    assert HOSTILE in page.answers and "(nothing)" in page.answers
    assert any(a.endswith("[…] (5 more characters are in the table)") for a in page.answers)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not page.of("b") and not any("onerror" in attrs for _, attrs in page.tags)
    assert html.count("</script>") == 1
    assert {"scores-1-length.png", "length.png"} <= {
        p.name for p in (run.path / "report").iterdir()
    }


def test_ten_thousand_long_responses_stay_below_ten_megabytes(tmp_path):
    world = random_world(4, 3, prompts=220, responses=20)
    run, recipe, learner = make_run(
        tmp_path / "run", world, ["dual.responses_per_prompt=100", "dual.prompts_per_round=110"]
    )
    play(run, recipe, learner, 1)
    long_text = '"' * 4000  # the character that grows most when escaped
    for path in (run.samples_file(0), run.reference_file):
        write_parquet(read_parquet(path).assign(response=long_text), path)
    write_parquet(run.prompts().assign(prompt=long_text), run.prompts_file)
    contents = read_contents(run)
    assert len(contents.after) == 11_000
    page, html = reported(run)
    assert len(html.encode()) < 10_000_000
    cards = sum("data-change0" in attrs for attrs in page.of("li"))
    assert 100 < cards <= 100 + EXTREMES
    assert f"{cards} of 11,000 pairs of responses to 110 test prompts" in html


def test_the_samples_shown_are_the_first_draws_and_the_extremes():
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [[f"p{i}" for i in range(150)], range(5)], names=["prompt_id", "draw"]
    )
    changes = pd.DataFrame(
        {"a": rng.normal(size=len(index)), "b": rng.normal(size=len(index))}, index=index
    )
    chosen = choose_samples(changes, ["a", "b"])
    assert list(chosen)[:100] == [(f"p{i}", 0) for i in range(100)]
    count = EXTREMES // 4
    for name in ("a", "b"):
        ordered = changes[name].sort_values()
        for keys, word in ((ordered.index[:count], "losses"), (ordered.index[-count:], "gains")):
            marked = {
                key
                for key, reasons in chosen.items()
                if f"among the {count} largest {word} of {name}" in reasons
            }
            assert marked == set(keys)


def test_no_constraint_is_reported_too(tmp_path):
    run, recipe, learner = make_run(
        tmp_path / "run", random_world(8, 0, prompts=12), ["dual.responses_per_prompt=4"]
    )
    play(run, recipe, learner, 1)
    page, _ = reported(run)
    _, sentence = write_report(run)
    assert (
        sentence.startswith("No constraint was set: round 0 reaches E[r]")
        and len(page.captions) == 3
    )


def test_where_there_is_nothing_to_report_one_line_says_so(tmp_path, long_run):
    run, recipe, learner = make_run(tmp_path / "run", random_world(9))
    with pytest.raises(UserError, match=r"no round has been played yet.* next: prepare"):
        write_report(run)
    play(run, recipe, learner, 0)
    with pytest.raises(
        UserError, match=r"no round has been played yet.* next: round 0 of 5: relabel"
    ):
        write_report(run)
    with pytest.raises(UserError, match=r"--round 12: .* has rounds 0 to 11"):
        write_report(long_run, 12)
    result = cdpo("report", tmp_path / "run", check=2)
    assert result.stderr.count("\n") == 1 and "no round has been played yet" in result.stderr
    assert not (run.path / "report").exists()


def test_a_run_in_progress_is_reported_while_it_is_locked_and_without_torch(long_run):
    code = (
        "import sys\nfrom constrained_dpo.cli.main import app\n"
        f"try: app(['report', {str(long_run.path)!r}, '--round', '2'])\nexcept SystemExit as "
        "stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes', "
        "'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not heavy, f'imported {heavy}'\n"
    )
    with long_run.locked():
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    path = long_run.path / "report" / "report.html"
    assert result.stdout.endswith(f"{path}\n") and result.stdout.startswith(
        "After round 2, on 12 unseen test prompts"
    )
