"""`cdpo compare --output`: compare.csv, compare.md, the figures and one self-contained page;
written whole, from the runs' files alone."""

from pathlib import Path

from constrained_dpo.experiments.compare import Group, side_by_side
from constrained_dpo.report.comparison_figures import pictures
from constrained_dpo.report.comparison_text import flat_table, markdown, means_table, text_table
from constrained_dpo.report.contents import signed
from constrained_dpo.report.page import render_page, shortened
from data_prep.errors import UserError
from data_prep.files import write_atomically


def write_comparison(
    groups: list[Group], left_out: list[tuple[str, str]], folder: Path, num_prompts: int
) -> list[Path]:
    """Writes the tables, the figures (light and dark) and compare.html, the latter last; returns
    what was written.

    num_prompts: prompts of each group whose answers are shown side by side. Raises UserError where
    the folder cannot be written.
    """
    contents, shown = (
        {
            "compare.csv": flat_table(groups).to_csv(index=False).encode(),
            "compare.md": markdown(groups).encode(),
        },
        [],
    )
    for number, group in enumerate(groups, 1):
        prefix = f"{number}-" if len(groups) > 1 else ""
        figures = [picture.drawn() for picture in pictures(group, prefix)]
        for figure in figures:
            contents |= figure.files
        shown.append(
            {
                "group": group,
                "tables": [t for t in (text_table(group), means_table(group)) if t is not None],
                "figures": figures,
                "samples": _cards(group, num_prompts),
            }
        )
    count = sum(len(group.rows) for group in groups)
    contents["compare.html"] = render_page(
        "compare.html.j2", {"shown": shown, "left_out": left_out, "count": count}
    ).encode()
    try:
        for name, data in contents.items():
            write_atomically(folder / name, data)
        for old in folder.glob("*.png"):  # of a comparison of other runs
            if old.name not in contents:
                old.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make it writable or choose another "
            "--output"
        ) from error
    return [folder / name for name in contents]


def _cards(group: Group, count: int) -> list[dict[str, object]]:
    """Prompts with every run's answer, ready to show."""
    return [
        {
            "id": card["prompt_id"],
            "prompt": shortened(card["prompt"]),
            "answers": [
                answer
                | {
                    "response": shortened(answer["response"]),
                    "scores": [(n, signed(v, 2)) for n, v in answer["scores"].items()],
                }
                for answer in card["answers"]
            ],
        }
        for card in side_by_side(group, count)
    ]
