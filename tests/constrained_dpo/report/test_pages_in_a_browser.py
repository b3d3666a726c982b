"""The report and the front of a real run in a real Chromium: what a reader sees, does and is never
asked for."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from constrained_dpo.evaluation.front_record import Front
from constrained_dpo.report.contents import signed
from constrained_dpo.report.drawing import DARK, LIGHT
from constrained_dpo.run.directory import RunDirectory
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.browser import CONTRASTS, OVERFLOWS, STOPS, chromium, opened
from tests.helpers.cli import cdpo

pytestmark = pytest.mark.slow

LONG = "many words that fill a card " * 40 + "x" * 400
"""An answer that has to be scrolled, with a word that no line holds."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def played(browser, conditional_run, tmp_path_factory):
    """The run with a front and its pages; one answer is long. Asks for the browser first: without
    one nothing is played."""
    run = RunDirectory(tmp_path_factory.mktemp("pages") / "run")
    shutil.copytree(conditional_run.path, run.path)
    table = read_parquet(run.reference_file)
    longest = table.index[table["split"] == "test"][0]
    table.loc[longest, "response"] = LONG
    write_parquet(table, run.reference_file)
    cdpo("front", run.path, "--margins", "harmless=0,0.25,0.5", check=0)
    cdpo("report", run.path, check=0)
    report, front = run.path / "report/report.html", run.path / "front/front.html"
    return SimpleNamespace(run=run, report=report, front=front)


@pytest.fixture(scope="module")
def without_front(browser, small_run, tmp_path_factory):
    """The report of a run that has no front."""
    path = tmp_path_factory.mktemp("plain") / "run"
    shutil.copytree(small_run.path, path)
    cdpo("report", path, check=0)
    return path / "report/report.html"


def first_answers(run, file, count=3) -> list[str]:
    prompts = run.prompts()
    ids = prompts.loc[prompts["split"] == "test", "prompt_id"].head(count)
    table = read_parquet(file)
    return [table.loc[table["prompt_id"] == pid, "response"].iloc[0] for pid in ids]


def visible_texts(page, selector) -> list[str]:
    return [e.inner_text() for e in page.query_selector_all(selector) if e.is_visible()]


def boxes(page, selector) -> list[dict]:
    return [element.bounding_box() for element in page.query_selector_all(selector)]


def test_the_first_screen_has_the_verdict_the_front_and_three_answers(played, browser):
    with opened(browser, played.report, height=720) as shown:
        page = shown.page
        sentence = cdpo("report", played.run.path, check=0).stdout.splitlines()[0]
        assert sentence in page.inner_text(".verdict")
        assert page.inner_text(".lead figure h2") == "What harmless costs"
        cards = page.query_selector_all("#answers li")
        texts = [[a.inner_text() for a in card.query_selector_all(".answer")] for card in cards]
        tables = (played.run.reference_file, played.run.samples_file(1))
        before, after = (first_answers(played.run, table) for table in tables)
        assert texts == [list(pair) for pair in zip(before, after, strict=True)]
        for box in boxes(page, ".verdict, .lead img, #answers li"):
            assert box["y"] >= 0 and box["y"] + box["height"] <= 720
        assert page.query_selector_all("details[open]") == []
        assert not page.is_visible("#table-of-rounds") and not page.is_visible("#cards")


def test_without_a_front_the_reward_against_the_slack_leads(without_front, browser):
    with opened(browser, without_front) as shown:
        assert shown.page.inner_text(".lead figure h2") == "Reward against slack of harmless"
        alt = shown.page.get_attribute(".lead img", "alt")
        record = json.loads((without_front.parents[1] / "rounds/001/round.json").read_text())
        test = record["test"]
        assert f"round 1 at {signed(test['u']['harmless'])}, {signed(test['reward'])}" in alt


def test_the_slider_moves_the_numbers_the_answers_and_the_mark(played, browser):
    run = played.run
    front = Front.read(run.front_file)
    picture = imread(run.path / "front/front.png")[..., :3]
    with opened(browser, played.front) as shown:
        page = shown.page
        page.focus("#slider")
        page.keyboard.press("Home")
        seen = []
        for row in front.rows:
            words = f"harmless ≥ {row.levels['harmless']:g}"
            assert page.inner_text("#words") == words
            assert page.get_attribute("#slider", "aria-valuetext") == words
            assert row.verdict in page.inner_text(".panel .verdict >> visible=true").lower()
            numbers = " ".join(visible_texts(page, ".panel dd"))
            for value in (row.reward, row.reward_change, row.gains["harmless"], row.u["harmless"]):
                assert signed(value) in numbers
            assert f"{row.lambda_['harmless']:.4f}" in numbers
            answers = visible_texts(page, ".lead .settings .answer")
            assert answers == first_answers(run, run.front_folder(row.key) / "samples.parquet")
            seen.append((numbers, answers))
            assert_marked(page, picture, hollow=bool(row.outside or row.kappa_outside))
            page.keyboard.press("ArrowRight")
        assert len({numbers for numbers, _ in seen}) == len({str(a) for _, a in seen}) == 3
        assert page.inner_text("#words") == "harmless ≥ 0.5"  # the end is the end
        assert shown.complaints == []


def assert_marked(page, picture: np.ndarray, hollow: bool) -> None:
    """The one visible mark has its centre on a marker of the figure."""
    (mark,) = [e.bounding_box() for e in page.query_selector_all(".mark") if e.is_visible()]
    image = page.query_selector(".marked img").bounding_box()
    x = (mark["x"] + mark["width"] / 2 - image["x"]) / image["width"]
    y = (mark["y"] + mark["height"] / 2 - image["y"]) / image["height"]
    pixel = picture[round(y * picture.shape[0]), round(x * picture.shape[1])]
    colour = to_rgb(LIGHT.background if hollow else LIGHT.series[0])
    assert np.abs(pixel - colour).max() < 0.03


def test_answers_are_sorted_from_the_keyboard(played, browser):
    with opened(browser, played.report) as shown:
        page = shown.page
        page.focus("#samples > summary")
        page.keyboard.press("Enter")
        page.focus("#sort")
        page.keyboard.press("ArrowDown")  # the largest loss of the utility
        changes = page.eval_on_selector_all("#cards > li", "all => all.map(e => e.dataset.change1)")
        values = [float(change) for change in changes]
        assert len(set(values)) > 3 and values == sorted(values)


@pytest.mark.parametrize("name", ["report", "front"])
def test_the_keyboard_alone_reaches_and_opens_everything(played, browser, name):
    with opened(browser, getattr(played, name), width=360) as shown:
        page, visited = shown.page, set()
        folds = len(page.query_selector_all("details"))
        for _ in range(300):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            assert page.evaluate("document.activeElement.matches(':focus-visible')")
            if page.evaluate("document.activeElement.matches('details:not([open]) > summary')"):
                page.keyboard.press("Enter")
        assert len(page.query_selector_all("details[open]")) == folds >= 4
        count = page.evaluate(STOPS)
        for _ in range(count + 1):  # all is open now
            page.keyboard.press("Tab")
            visited.add(page.evaluate("document.activeElement.dataset.stop"))
        missed = [
            element.evaluate("e => e.outerHTML.slice(0, 80)")
            for element in page.query_selector_all("[data-stop]")
            if element.get_attribute("data-stop") not in visited
        ]
        assert missed == [] and count > folds


@pytest.mark.parametrize("name", ["report", "front"])
def test_no_request_leaves_a_page_and_none_could(played, browser, name):
    with opened(browser, getattr(played, name)) as shown:
        shown.unfold()
        shown.page.keyboard.press("Tab")
        shown.page.keyboard.press("ArrowRight")
        shown.page.wait_for_load_state("networkidle")
        assert shown.requests == [getattr(played, name).as_uri()] and shown.complaints == []
        refused = shown.page.evaluate("""() => new Promise(resolve => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", event => {
            refused.push(event.effectiveDirective);
            if (refused.length === 2) resolve(refused.sort());
          });
          new Image().src = "https://example.org/a.png";
          fetch("https://example.org/").catch(() => {});
        })""")
        assert refused == ["connect-src", "img-src"]


def test_a_request_would_have_been_seen(browser, tmp_path):
    (tmp_path / "page.html").write_text('<img src="http://127.0.0.1:9/a.png">')
    with opened(browser, tmp_path / "page.html") as shown:
        assert shown.requests[1:] == ["http://127.0.0.1:9/a.png"] and shown.complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "front"])
def test_every_text_stands_out_in_light_and_in_dark(played, browser, name, scheme):
    with opened(browser, getattr(played, name), scheme=scheme) as shown:
        shown.unfold()
        page = shown.page
        for verdict in ("satisfied", "undecided", "violated"):
            page.eval_on_selector_all(
                ".verdict, td.left:last-child",
                "(all, word) => all.forEach(element => {"
                "element.classList.remove('satisfied', 'undecided', 'violated');"
                "element.classList.add(word); })",
                verdict,
            )
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 50
            assert [pair for pair in contrasts if pair[0] < 4.5] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", ground)[0]) < 100) == (scheme == "dark")
        source = page.eval_on_selector("picture", "e => e.querySelector('source').srcset")
        assert (page.eval_on_selector("picture img", "e => e.currentSrc") == source) == (
            scheme == "dark"
        )


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_the_words_of_figures_stand_out_too(style):
    def luminance(colour: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    low, high = sorted(map(luminance, (style.text, style.background)))
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["report", "front"])
def test_narrow_and_wide_windows_hold_the_page(played, browser, name, width):
    with opened(browser, getattr(played, name), width=width) as shown:
        shown.unfold()
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.page.evaluate(OVERFLOWS) == []


def test_without_scripts_the_front_shows_every_setting(played, browser):
    with opened(browser, played.front, scripts=False) as shown:
        page = shown.page
        assert len(visible_texts(page, ".lead .settings .answer")) == 3 * 3
        assert visible_texts(page, "#slider") == visible_texts(page, ".panel, .mark") == []
        page.click("#numbers > summary")
        assert len(visible_texts(page, "#table-of-settings tbody tr")) == 3
