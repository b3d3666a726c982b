"""The page of a front: a slider over its settings, with the numbers, the verdict and the same
prompts' answers at each. From the run's files alone; no model is loaded.

Without scripts every setting is shown: the numbers in a table, the answers one below the other.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from constrained_dpo.evaluation.front_record import Front, FrontRow
from constrained_dpo.report.contents import signed
from constrained_dpo.report.front_figures import front_marks, front_pictures
from constrained_dpo.report.front_words import (
    distance,
    front_notes,
    gain,
    row_notes,
    setting_words,
    slack,
    with_error,
)
from constrained_dpo.report.page import TEMPLATES, render_page, shortened
from constrained_dpo.report.picture import DrawnPicture
from constrained_dpo.report.verdict_words import MEANING
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.prompts.messages import last_user_text
from data_prep.readers.tables import read_parquet

SHOWN_PROMPTS, LEAD_PROMPTS = 8, 3
"""Test prompts whose answers are on the page, and on its first screen."""


def write_front(run: RunDirectory, front: Front) -> Path:
    """Write RUN/front/front.html and its PNGs; return the page's path.

    Raises UserError where the folder cannot be written.
    """
    folder, record = run.front_file.parent, RoundRecord.read(run.round_file(front.round))
    figures = [picture.drawn() for picture in front_pictures(front, record)]
    page = _render(run, front, figures, front_marks(front, record))
    try:
        for figure in figures:
            for name, data in figure.files.items():
                write_atomically(folder / name, data)
        write_atomically(folder / "front.html", page.encode())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make it writable or free some space"
        ) from error
    return folder / "front.html"


def _render(
    run: RunDirectory,
    front: Front,
    figures: list[DrawnPicture],
    marks: list[list[tuple[float, float]]],
) -> str:
    recipe, rows = run.recipe(), front.rows
    script = (TEMPLATES / "front.js").read_text(encoding="utf-8")
    values = {
        "name": recipe.name,
        "run": run.path.name,
        "round": front.round,
        "problem": recipe.problem.describe().splitlines(),
        "reward": front.reward,
        "names": list(front.levels),
        "percent": f"{100 * front.confidence:g} %",
        "settings": [_setting(front, row) for row in rows],
        "first": _first(front, rows),
        "lead": LEAD_PROMPTS,
        "reference": [(name, signed(value)) for name, value in front.reference.items()],
        "notes": [f"{line[0].upper()}{line[1:]}." for line in front_notes(front)],
        "figures": figures,
        "marks": marks,
        "cards": _cards(run, rows, recipe.prompts.format, recipe.problem.columns),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return render_page("front.html.j2", values)


def _first(front: Front, rows: list[FrontRow]) -> int:
    """The setting that the slider starts at: the one nearest to the recipe's."""
    if not rows:
        return 0
    far = [
        (not row.solved, abs(row.kappa - 1), sum(abs(row.levels[n] - v) for n, v in goals.items()))
        for goals in [front.levels]
        for row in rows
    ]
    return far.index(min(far))


def _setting(front: Front, row: FrontRow) -> dict[str, Any]:
    """A point as the page writes it."""
    return {
        "words": setting_words(row),
        "verdict": row.verdict,
        "meaning": MEANING[row.verdict],
        "confidence": f"{100 * row.verdict_confidence:.5g} %",
        "look": row.look,
        "reward": with_error(row.reward, row.reward_se),
        "change": with_error(row.reward_change, row.reward_change_se),
        "kl": distance(row),
        "objective": with_error(row.objective, row.objective_se),
        "kappa": f"{row.kappa:.4g}",
        "length": f"{row.mean_length:.1f}",
        "cut": f"{100 * row.cut_off_fraction:.0f} %",
        "trials": row.num_trials,
        "notes": row_notes(row),
        "constraints": [
            {
                "name": name,
                "level": f"{row.levels[name]:g}",
                "lambda": f"{row.lambda_[name]:.4f}",
                "reached": signed(row.utilities[name]),
                "gain": gain(row, name),
                "u": slack(row, name),
                "verdict": row.verdicts[name],
            }
            for name in front.levels
        ],
    }


def _cards(
    run: RunDirectory, rows: Iterable[FrontRow], format: str, columns: list[str]
) -> list[dict[str, Any]]:
    """The first test prompts with π_ref's first answer and that of every setting."""
    prompts = run.prompts()
    prompts = prompts[prompts["split"] == "test"].head(SHOWN_PROMPTS)
    reference = _first_answers(run.reference_file, prompts, columns)
    answers = [
        _first_answers(run.front_folder(row.key) / "samples.parquet", prompts, columns)
        for row in rows
    ]
    return [
        {
            "id": pid,
            "prompt": shortened(last_user_text(prompt, format)),
            "reference": reference[pid],
            "answers": [by_prompt[pid] for by_prompt in answers],
        }
        for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True)
    ]


def _first_answers(
    file: Path, prompts: pd.DataFrame, columns: list[str]
) -> dict[str, dict[str, Any]]:
    table = read_parquet(file, ["prompt_id", "response", "ended", "split", *columns])
    table = table[(table["split"] == "test") & table["prompt_id"].isin(prompts["prompt_id"])]
    first = table.drop_duplicates("prompt_id").set_index("prompt_id").to_dict("index")
    return {
        str(pid): {
            "text": shortened(answer["response"]),
            "scores": [(n, signed(answer[n], 2)) for n in columns if pd.notna(answer[n])],
            "cut": not answer["ended"],
        }
        for pid, answer in first.items()
    }
