"""The report as a reader gets it: real runs (exact maximizer as the learner), the page parsed, its
numbers against round.json."""

import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.report.contents import read_contents, signed
from constrained_dpo.report.page import MAX_CHARACTERS
from constrained_dpo.report.run_page import notes, verdict_sentence, write_report
from constrained_dpo.report.run_samples import EXTREMES
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import read_records
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.cli import cdpo
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.rounds import make_run, play
from tests.helpers.tables import random_world

ROUNDS = 2


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> RunDirectory:
    """2 constraints, several rounds."""
    world = random_world(3, 2, prompts=24, responses=30, margin=0.25)
    run, recipe, learner = make_run(
        tmp_path_factory.mktemp("long") / "run", world, ["dual.responses_per_prompt=8"]
    )
    play(run, recipe, learner, ROUNDS)
    return run


@pytest.fixture(scope="module")
def long_page(long_run) -> tuple[Page, str, str]:
    """The page parsed, its HTML, and the sentence that was returned with it."""
    path, sentence = write_report(long_run)
    return Page(path.read_text()), path.read_text(), sentence


def test_the_page_is_self_contained_and_every_image_names_its_files(long_run, long_page):
    page, html, _ = long_page
    assert not re.search(r"https?:", html) and not page.of("link") and not page.of("iframe")
    assert len(page.scripts) == 1 and all("src" not in attrs for attrs in page.of("script"))
    for attrs in page.of("img") + page.of("source"):
        assert attrs.get("src", attrs.get("srcset")).startswith("data:image/png;base64,")
    # multipliers, slack and path by constraint, certificate, scores by objective, lengths
    figures = 1 + 2 + 2 + 1 + 3 + 1
    assert {len(page.of(tag)) for tag in ("img", "source", "figure")} == {figures}
    assert len(page.captions) == figures and all(attrs["alt"] for attrs in page.of("img"))
    for caption in page.captions:
        drawn, saved = re.search(r"Drawn from (.*); saved as (.*)\.$", caption).groups()
        names = re.split(r", | to ", drawn)
        assert names and all((long_run.path / name).is_file() for name in names), caption
        assert (long_run.path / saved).read_bytes().startswith(b"\x89PNG")
    assert len(list((long_run.path / "report").glob("*.png"))) == 2 * figures


def test_the_verdict_stands_on_top(long_run, long_page):
    _, html, sentence = long_page
    verdict = read_records(long_run)[-1].verdict
    box = f'<div class="verdict {verdict}"><p><strong>{verdict}</strong>{sentence}</p></div>'
    assert box in html


def test_the_table_of_rounds_holds_the_numbers_of_round_json(long_run, long_page):
    page, _, _ = long_page
    rows = [[cell.strip() for cell in row] for row in page.rows[1:]]
    assert len(rows) == (ROUNDS + 1) * 2
    for number, record in enumerate(read_records(long_run)):
        block, test = rows[2 * (number + 1) : 2 * (number + 2)], record.test
        assert block[0].pop(0) == str(number)
        assert block[0][6:9] == [signed(test.reward), signed(test.kl), signed(test.objective)]
        for name, cells in zip(["g0", "g1"], block, strict=True):
            expected = [name, f"{record.lambda_[name]:.4f}", f"{record.lambda_next[name]:.4f}"]
            for measured in (record, test):
                low, high = signed(measured.u_ci_low[name]), signed(measured.u_ci_high[name])
                expected.append(f"{signed(measured.u[name])} [{low}, {high}]")
            assert cells[:6] == [*expected, test.verdicts[name]]
    reference = read_parquet(long_run.reference_file)
    means = reference[reference["split"] == "test"].groupby("prompt_id")[["r"]].mean().mean()
    assert rows[0][7] == signed(means["r"]) and rows[0][5] == signed(-0.25)


def test_verdicts_are_said_in_words(long_run):
    contents = read_contents(long_run, 0)
    test, sentence = contents.record.test, verdict_sentence(contents)
    assert set(test.verdicts.values()) == {"violated"}
    assert sentence.startswith(
        "After round 0, on 12 unseen test prompts and at 95 % confidence over all 2 constraints "
        "together, none satis"
    )
    level = "g1 (at least 0.25 above the reference policy)"
    assert f"{level} is violated, u = {signed(test.u['g1'])} [" in sentence
    assert any("Round 0 was chosen with --round" in note for note in notes(contents))
    assert not any("--round" in note for note in notes(read_contents(long_run)))


@pytest.mark.parametrize(
    ("margin", "verdict"), [(-3.0, "satisfied"), (9.0, "violated"), (0.0, "undecided")]
)
def test_the_verdict_of_one_constraint(tmp_path, margin, verdict):
    # β so large that the policy stays at π_ref
    world = random_world(1, 1, prompts=12, responses=10, margin=margin, beta=1e6)
    run, recipe, learner = make_run(tmp_path / "run", world, ["dual.responses_per_prompt=8"])
    play(run, recipe, learner, 1)
    contents = read_contents(run)
    start = (
        "After round 0, on 6 unseen test prompts and at 95 % confidence, g0 (at least "
        f"{margin:g} above the reference policy)"
    )
    assert verdict_sentence(contents).startswith(f"{start} is {verdict}, u = ")
    assert notes(contents)[0].startswith(f"{verdict.capitalize()}: ")


def test_model_output_prompts_and_names_are_text_never_markup(tmp_path):
    world = random_world(2, 0, prompts=12, responses=10)
    # an objective may be called as the length histogram is
    problem = ConstrainedProblem("length", 0.5, ())
    world = TabularWorld(problem, world.ref_logp, world.reward, {})
    settings = ["objective.reward.name=length", "name=</title><b>bold</b>"]
    settings += ["dual.responses_per_prompt=6"]
    run, recipe, learner = make_run(tmp_path / "run", world, settings)
    learner.prompts["prompt"] = HOSTILE
    play(run, recipe, learner, 1)
    texts = [HOSTILE, "x" * (MAX_CHARACTERS + 5), ""]
    for path in (run.samples_file(0), run.reference_file):
        table = read_parquet(path)
        write_parquet(table.assign(response=texts * (len(table) // 3)), path)
    html = write_report(run)[0].read_text()
    page = Page(html)
    assert HOSTILE in page.answers and "(nothing)" in page.answers
    assert any(a.endswith("[…] (5 more characters are in the table)") for a in page.answers)
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not page.of("b") and not any("onerror" in attrs for _, attrs in page.tags)
    assert html.count("</script>") == 1
    files = {path.name for path in (run.path / "report").iterdir()}
    assert {"scores-0-length.png", "length.png"} <= files


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run without a constraint, the sentence of its report and the report's files."""
    run, recipe, learner = make_run(
        tmp_path_factory.mktemp("bare") / "run",
        random_world(8, 0, prompts=12),
        ["dual.responses_per_prompt=4"],
    )
    play(run, recipe, learner, 1)
    path, sentence = write_report(run)
    return run, sentence, {file.name: file.read_bytes() for file in path.parent.iterdir()}


def many_long_responses(table: pd.DataFrame, copies: int, draws: int, text: str) -> pd.DataFrame:
    """A table's rows for `copies` times its prompts, with `draws` times their responses."""
    tables = [
        table.assign(
            prompt_id=table["prompt_id"] + f"-{copy}",
            response_id=table["response_id"] + f"-{copy}-{draw}",
            response=text,
        )
        for copy in range(copies)
        for draw in range(draws)
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.mark.slow
def test_ten_thousand_long_responses_stay_below_ten_megabytes(bare, tmp_path):
    """No constraint is drawn, and figures are counted as for three."""
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(bare[0].path, run.path)
    long_text = '"' * 3500  # the character that grows most when escaped
    for path in (run.samples_file(0), run.reference_file):
        write_parquet(many_long_responses(read_parquet(path), 20, 25, long_text), path)
    prompts = run.prompts()
    copies = [prompts.assign(prompt_id=prompts["prompt_id"] + f"-{copy}") for copy in range(20)]
    write_parquet(pd.concat(copies, ignore_index=True).assign(prompt=long_text), run.prompts_file)
    html = write_report(run)[0].read_text()
    largest = max(path.stat().st_size for path in (run.path / "report").glob("*.png"))
    further_figures = 2 * (1 + 3 * 3)  # multipliers; slack, path and scores: light and dark
    assert len(html.encode()) + further_figures * largest * 4 / 3 < 10_000_000
    cards = len(re.findall(r"<li[^>]* data-change0=", html))
    assert 100 < cards <= 100 + EXTREMES
    assert f"{cards} of 12,000 pairs of responses to 120 test prompts" in html


def test_no_constraint_is_reported_too(bare):
    _, sentence, files = bare
    assert sentence.startswith("No constraint was set: round 0 reaches E[r]")
    assert len(Page(files["report.html"].decode()).captions) == 3


WITHOUT_TORCH = """
import sys
from constrained_dpo.cli.main import app

try:
    app(["report", sys.argv[1], "--round", "0"])
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = "torch transformers trl peft datasets bitsandbytes matplotlib.pyplot".split()
assert not (imported := set(heavy) & set(sys.modules)), imported
"""


@pytest.fixture(scope="module")
def again(bare):
    """`cdpo report` in a process of its own, while another holds the run; a figure of an earlier
    report is there."""
    run = bare[0]
    (run.path / "report" / "u-4-gone.png").write_bytes(b"of an earlier report")
    with run.locked():
        command = [sys.executable, "-c", WITHOUT_TORCH, str(run.path)]
        return subprocess.run(command, capture_output=True, text=True)


def test_a_run_in_progress_is_reported_while_it_is_locked_and_without_torch(bare, again):
    run, sentence, _ = bare
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{sentence}\n{run.path / 'report' / 'report.html'}\n"


def test_a_second_report_replaces_the_first(bare, again):
    run, _, first = bare
    second = {file.name: file.read_bytes() for file in (run.path / "report").iterdir()}
    assert again.returncode == 0 and second == first


def test_where_there_is_nothing_to_report_one_line_says_so(tmp_path, long_run):
    run, recipe, learner = make_run(tmp_path / "run", random_world(9))
    with pytest.raises(UserError, match=r"no round has been played yet.* next: prepare"):
        write_report(run)
    play(run, recipe, learner, 0)
    with pytest.raises(
        UserError, match=r"no round has been played yet.* next: round 0 of 5: relabel"
    ):
        write_report(run)
    with pytest.raises(UserError, match=rf"--round {ROUNDS}: .* has rounds 0 to {ROUNDS - 1}"):
        write_report(long_run, ROUNDS)
    result = cdpo("report", tmp_path / "run", check=2)
    assert result.stderr.count("\n") == 1 and "no round has been played yet" in result.stderr
    assert not (run.path / "report").exists()
