"""How many prompts a gate will probably need, said before it draws them."""

from collections.abc import Mapping, Sequence

import pandas as pd

from constrained_dpo.gate.record import Look
from constrained_dpo.gate.spending import POWER, expected_size
from constrained_dpo.run.directory import RunDirectory
from data_prep.readers.tables import read_parquet


def pilot_tables(run: RunDirectory, number: int | None) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Give a round's and π_ref's responses to the dual prompts: what is known of the policy before
    it is sampled, without a look at test prompts. None for an adapter from elsewhere."""
    if number is None:
        return None
    tables = (read_parquet(run.samples_file(number)), read_parquet(run.reference_file))
    samples, reference = (t[t["split"] == "dual"].reset_index(drop=True) for t in tables)
    return samples, reference


def expectation(
    rooms: Mapping[str, pd.Series | tuple[float, float]], plan: Sequence[Look], source: str
) -> str:
    """Say how many prompts will probably decide the checks.

    rooms: by check, of prompts, or their mean and standard deviation; plan: the looks to come;
    source: what the rooms are of. A check that will fail ends the gate.
    """
    sizes, errors = [look.size for look in plan], [look.error for look in plan]
    needed: dict[str, int | None] = {}
    failing: dict[str, int] = {}
    for title, room in rooms.items():
        moments = room if isinstance(room, tuple) else (room.mean(), room.std(ddof=1))
        mean, std = map(float, moments)
        size = expected_size(mean, std, sizes, errors)
        needed[title] = size
        if mean < 0 and size is not None:
            failing[title] = size
    percent = f"{100 * POWER:g} %"
    if failing:
        first = min(failing, key=lambda title: failing[title])
        return f"about {failing[first]} prompts to see {first} fail ({percent} likely, by {source})"
    never = [title for title, size in needed.items() if size is None]
    if never or not needed:
        return (
            f"{sizes[-1]} prompts will probably not decide {', '.join(never)} (by {source})"
            if needed
            else f"nothing is known of the checks yet; at most {sizes[-1]} prompts"
        )
    slowest = max(needed, key=lambda title: needed[title] or 0)
    return (
        f"about {needed[slowest]} of at most {sizes[-1]} prompts; {slowest} needs the most "
        f"({percent} likely, by {source})"
    )
