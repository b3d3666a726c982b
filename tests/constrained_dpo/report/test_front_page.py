"""The page of a front as a reader gets it: the exact maximizer as the learner, the page parsed, its
numbers against front.json."""

import html
import json
import re

import pytest

from constrained_dpo.evaluation.front import play_front, settings_of
from constrained_dpo.evaluation.front_source import FrontOptions
from constrained_dpo.report.contents import signed
from constrained_dpo.report.front_page import SHOWN_PROMPTS, write_front
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.rounds import play_round
from data_prep.readers.tables import read_parquet, write_parquet
from tests.helpers.pages import HOSTILE, Page
from tests.helpers.rounds import make_run
from tests.helpers.tables import random_world

SETTINGS = ("dual.method=solve", "fit.conditional={}", "dual.rounds=1", "dual.trials=2")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The run, its front of two constraints, and its page; one answer tries to break it."""
    world = random_world(3, 2, prompts=24, responses=30)
    path = tmp_path_factory.mktemp("front") / "run"
    settings = [*SETTINGS, "dual.init={g0: 0.8, g1: 0.8}", "dual.responses_per_prompt=8"]
    run, recipe, learner = make_run(path, world, settings)
    recipe = prepare(run, recipe, learner, {})
    play_round(run, recipe, learner)
    points = settings_of(run, recipe, {"g0": [0.1, 0.3]}, {"g1": 0.5}, [1.0, 0.5])
    front = play_front(run, recipe, learner, points, FrontOptions())
    file = run.front_folder(front.rows[0].key) / "samples.parquet"
    table = read_parquet(file)
    table.loc[table["split"] == "test", "response"] = HOSTILE
    write_parquet(table, file)
    return run, front, write_front(run, front).read_text()


def test_the_page_is_self_contained_and_saves_its_figures(written):
    run, front, text = written
    page = Page(text)
    assert not re.search(r"https?:", text) and not page.of("link") and not page.of("iframe")
    assert len(page.scripts) == 1 and all("src" not in attrs for attrs in page.of("script"))
    for attrs in page.of("img") + page.of("source"):
        assert attrs.get("src", attrs.get("srcset")).startswith("data:image/png;base64,")
    assert len(page.of("img")) == 2 and all(attrs["alt"] for attrs in page.of("img"))
    pngs = sorted(file.name for file in (run.path / "front").glob("*.png"))
    assert pngs == [f"front-{i}-g{i - 1}{dark}.png" for i in (1, 2) for dark in ("-dark", "")]
    assert text == write_front(run, front).read_text()  # the same front, the same bytes


def test_every_number_of_front_json_is_on_the_page(written):
    run, _, text = written
    content = json.loads((run.path / "front" / "front.json").read_text())
    assert len(content["points"]) == 6
    missing = []
    for point in content["points"]:
        words = [signed(point[key]) for key in ("reward", "reward_change", "objective")]
        words += [f"{point[key]:.3f}" for key in ("reward_se", "reward_change_se", "kl", "kl_se")]
        words += [f"{point['objective_se']:.3f}", f"{point['kappa']:.4g}", str(point["look"])]
        words += [f"{100 * point['verdict_confidence']:.5g} %", point["verdict"]]
        words += [f"{point['mean_length']:.1f}", f"{100 * point['cut_off_fraction']:.0f} %"]
        for name in ("g0", "g1"):
            values = [point[key][name] for key in ("utilities", "gains", "u")]
            values += [point[key][name] for key in ("u_ci_low", "u_ci_high")]
            words += [signed(value) for value in values] + [f"{point['lambda'][name]:.4f}"]
            words += [f"{point['levels'][name]:g}", point["verdicts"][name]]
        missing += [word for word in words if word not in text]
    assert missing == []
    assert all(f"E[{n}] {signed(value)}" in text for n, value in content["reference"].items())


def test_the_slider_has_every_setting_and_pages_without_scripts_have_them_too(written):
    _, front, text = written
    page = Page(text)
    (slider,) = [attrs for attrs in page.of("input") if attrs["type"] == "range"]
    assert slider["max"] == str(len(front.rows) - 1) and slider["id"] == "slider"
    panels = [a for a in page.of("div") if a.get("class") == "panel"]
    assert [a["data-setting"] for a in panels] == [str(i) for i in range(len(front.rows))]
    assert not any("hidden" in a for a in panels)  # the script hides the others
    assert [a["id"] for a in page.of("div") if "hidden" in a] == ["controls"]
    assert len(page.answers) == SHOWN_PROMPTS * (1 + len(front.rows))
    assert 'for="slider"' in text and "aria-live" in text


def test_what_a_model_wrote_is_shown_and_never_run(written):
    _, _, text = written
    page = Page(text)
    assert page.answers.count(HOSTILE) == SHOWN_PROMPTS
    assert HOSTILE not in text and html.escape("<img src=x") in text
    assert len(page.of("script")) == 1 and len(page.of("img")) == 2
