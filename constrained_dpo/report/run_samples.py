"""The answers that a run's page shows beside each other, and why each is there."""

import json
from typing import Any

import pandas as pd

from constrained_dpo.report.contents import Contents, signed
from constrained_dpo.report.page import shortened
from data_prep.prompts.messages import last_user_text

FIRST_RESPONSES, EXTREMES = 100, 60
"""Pairs of responses on the page: first draws, and largest changes over all constraints."""

Draw = tuple[str, int]
"""prompt_id, and the draw's number within the prompt."""


def choose_samples(changes: pd.DataFrame, names: list[str]) -> dict[Draw, list[str]]:
    """Choose the pairs of responses to show, each with what it is there for; a function of the
    tables alone.

    changes: score of the policy's response minus that of π_ref's, by (prompt_id, draw) in prompt
    order. The first draw of the first FIRST_RESPONSES prompts, then the largest losses and gains of
    every utility in `names`, EXTREMES in all.
    """
    first = changes.index[changes.index.get_level_values("draw") == 0][:FIRST_RESPONSES]
    chosen: dict[Draw, list[str]] = {key: [] for key in first}
    count = max(1, EXTREMES // (2 * len(names)))
    for name in names:
        change = changes[name]
        extremes = {
            f"among the {count} largest losses of {name}": change[change < 0].nsmallest(count),
            f"among the {count} largest gains of {name}": change[change > 0].nlargest(count),
        }
        for reason, rows in extremes.items():
            for key in changes.index.intersection(rows.index, sort=False):
                chosen.setdefault(key, []).append(reason)
    return chosen


def sample_cards(contents: Contents) -> list[dict[str, Any]]:
    """Give the chosen pairs of responses with their prompts, scores and changes, ready to show."""
    problem, names = contents.recipe.problem, contents.recipe.problem.columns
    changes = contents.after[names] - contents.before[names]
    chosen = choose_samples(changes, names[1:] or [problem.reward])
    prompts = contents.run.prompts().set_index("prompt_id")["prompt"].to_dict()
    format = contents.recipe.prompts.format
    tables = {"π_ref": contents.before, f"round {contents.shown}": contents.after}
    rows: dict[str, Any] = {
        title: table.loc[list(chosen)].to_dict("index") for title, table in tables.items()
    }
    cards = []
    for key, reasons in chosen.items():
        pid, draw = key
        sides = [_side(title, responses[key], names) for title, responses in rows.items()]
        moves = {n: float(changes[n][key]) for n in names if pd.notna(changes[n][key])}
        cards.append(
            {
                "prompt": shortened(_prompt_text(prompts[pid], format)),
                "question": shortened(last_user_text(prompts[pid], format)),
                "id": pid,
                "draw": draw,
                "sides": sides,
                "reasons": reasons,
                "changes": [(name, move, signed(move, 2)) for name, move in moves.items()],
            }
        )
    return cards


def _side(title: str, response: dict[str, Any], names: list[str]) -> dict[str, Any]:
    cut = "" if response["ended"] else ", cut off"
    return {
        "title": title,
        "text": shortened(response["response"]),
        "scores": [(n, signed(response[n], 2)) for n in names if pd.notna(response[n])],
        "length": f"{len(response['token_ids'])} tokens{cut}",
    }


def _prompt_text(prompt: str, format: str) -> str:
    """A prompt as it is read: the text, or the messages of a chat with their roles."""
    if format != "chat":
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in json.loads(prompt))
