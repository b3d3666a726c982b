"""`cdpo data relabel`: its options, and what it prints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from data_prep.console import AsJson, parse_assignments
from data_prep.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from data_prep.labels.multipliers import MultiplierRange

LEFT_OUT = {
    "single_response": "prompts with a single response",
    "cut_off": "responses that were cut off",
    "no_response": "prompts with no other response",
}
"""What `relabel_pairs` leaves out, in words."""


def relabel(
    responses: Annotated[
        Path,
        typer.Argument(
            help="scored responses: parquet, csv or jsonl with prompt_id, response_id and the "
            "columns"
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="file to write, by its ending: .parquet or .jsonl"),
    ],
    reward: Annotated[str, typer.Option(help="reward column")],
    lambda_: Annotated[
        list[str], typer.Option("--lambda", help="COL=VALUE, once per utility")
    ] = [],
    range_: Annotated[
        float | None,
        typer.Option(
            "--range", help="every row draws its λ within this factor of --lambda, e.g. 3"
        ),
    ] = None,
    floor: Annotated[
        list[str],
        typer.Option(
            help="COL=VALUE, with --range: the λ below which a range reaches 0; default: a tenth "
            "of std(reward)/std(COL) within prompts"
        ),
    ] = [],
    kappa: Annotated[
        str | None,
        typer.Option(
            help="LOW:HIGH, with --range: every row draws the factor κ on 1/β of the fit, e.g. "
            "0.5:1.5; no part of the scores"
        ),
    ] = None,
    labels: Annotated[str, typer.Option(help="soft, bernoulli or argmax")] = "soft",
    pairs_per_prompt: Annotated[str, typer.Option(help="a number, or all")] = "all",
    seed: Annotated[int, typer.Option(help="seed of pairs and draws")] = 0,
    text: Annotated[
        bool,
        typer.Option(
            "--text", help="add prompt, chosen, rejected: texts, of chats lists of messages"
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="with --text: table of prompt_id, prompt; default: the responses' column"
        ),
    ] = None,
    drop_cut_off: Annotated[
        bool,
        typer.Option(
            "--drop-cut-off",
            help="with --text: leave out responses that were cut off, which other trainers would "
            "give an end token",
        ),
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="groups of so many responses with their scores s, instead of pairs"
        ),
    ] = None,
    groups_per_prompt: Annotated[
        int, typer.Option(min=1, help="groups per prompt, with --group-size")
    ] = 4,
    as_json: AsJson = False,
) -> None:
    """Pseudo-preference pairs under given multipliers: P(y1 ≻ y2) = σ(s(y1) − s(y2)), s = reward +
    Σ λ·utility."""
    from data_prep.labels.pair_texts import PairTexts, read_prompt_texts
    from data_prep.labels.preferences import Labels
    from data_prep.labels.relabel import relabel_groups, relabel_pairs

    if labels not in get_args(Labels):
        raise UserError(f"--labels {labels}: is not one of {', '.join(get_args(Labels))}")
    if pairs_per_prompt != "all" and not (pairs_per_prompt.isdigit() and int(pairs_per_prompt) > 0):
        raise UserError(f"--pairs-per-prompt {pairs_per_prompt}: write a number ≥ 1, or all")
    if prompts is not None and not text:
        raise UserError("--prompts: only --text writes prompts; add it, or leave --prompts out")
    if drop_cut_off and not text:
        raise UserError(
            "--drop-cut-off: only texts are given an end token by other trainers; add --text, or "
            "leave it out"
        )
    if group_size is not None and (text or labels != "soft" or pairs_per_prompt != "all"):
        raise UserError(
            "--group-size: groups hold scores; leave out --text, --labels and --pairs-per-prompt"
        )
    center = parse_assignments(lambda_, "--lambda")
    multipliers = _multipliers(responses, reward, center, range_, floor, kappa)
    if group_size is not None:
        grouped = relabel_groups(
            responses,
            output,
            reward,
            multipliers,
            group_size=group_size,
            groups_per_prompt=groups_per_prompt,
            seed=seed,
        )
        _print_groups(output, grouped, group_size, multipliers, as_json)
        return
    beside = None if prompts is None else read_prompt_texts(prompts)
    done = relabel_pairs(
        responses,
        output,
        reward,
        multipliers,
        labels=cast(Labels, labels),
        pairs_per_prompt=None if pairs_per_prompt == "all" else int(pairs_per_prompt),
        seed=seed,
        texts=PairTexts(beside, drop_cut_off) if text else None,
    )
    _print_pairs(output, done, multipliers, as_json)


def _multipliers(
    responses: Path,
    reward: str,
    center: dict[str, float],
    factor: float | None,
    floor: list[str],
    kappa: str | None,
) -> "pd.Series | MultiplierRange":
    """The multipliers that the options describe; reads the table where the floor is measured."""
    import pandas as pd

    from data_prep.labels.multipliers import MultiplierRange, multiplier_floor
    from data_prep.readers.tables import read_columns

    if factor is None:
        for option, value in (("--floor", floor), ("--kappa", kappa)):
            if value:
                raise UserError(f"{option}: is of a range of multipliers; add --range, e.g. 3")
        return pd.Series(center, dtype=float)
    if not center:
        raise UserError("--range: there is no λ to draw; add --lambda COL=VALUE")
    floors = parse_assignments(floor, "--floor")
    for name in floors:
        if name not in center:
            raise UserError(f"--floor {name}: has no --lambda; name one of {', '.join(center)}")
    open_ = [name for name in center if name not in floors]
    if open_:
        table = read_columns(responses, ["prompt_id", reward, *open_])
        measured = multiplier_floor(table, reward, open_)
        floors |= {name: float(measured[name]) for name in open_}
    floor_ = pd.Series({name: floors[name] for name in center}, dtype=float)
    return MultiplierRange(pd.Series(center, dtype=float), floor_, factor, _kappa(kappa))


def _kappa(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(f"--kappa {text}: write LOW:HIGH, e.g. 0.5:1.5") from None


def _print_pairs(
    output: Path, done: dict[str, object], multipliers: "pd.Series | MultiplierRange", as_json: bool
) -> None:
    """Print the counts of `relabel_pairs`, in words or as JSON."""
    if as_json:
        print(json.dumps({"output": str(output), **done, **_range_facts(multipliers)}))
        return
    ambiguous = 100 * cast(float, done["ambiguous_fraction"])
    left_out = cast(dict[str, int], done["left_out"])
    words = [f"{n} {LEFT_OUT[why]}" for why, n in left_out.items()]
    print(
        f"{output}: {done['pairs']} pairs of {done['prompts']} prompts, {ambiguous:.0f} % with P "
        f"between 0.05 and 0.95; left out: {', '.join(words)}{_range_words(multipliers)}"
    )
    if done.get("cut_off_pairs"):
        print(
            f"{done['cut_off_pairs']} of {done['pairs']} pairs hold a response that was cut off; "
            "TRL ends it with an end token, and a policy learns to stop there: --drop-cut-off "
            "leaves such responses out"
        )


def _print_groups(
    output: Path,
    done: dict[str, int],
    group_size: int,
    multipliers: "pd.Series | MultiplierRange",
    as_json: bool,
) -> None:
    """Print the counts of `relabel_groups`, in words or as JSON."""
    few = done.pop("too_few_responses")
    if as_json:
        left_out = {"left_out": {"too_few_responses": few}}
        print(json.dumps({"output": str(output), **done, **left_out, **_range_facts(multipliers)}))
        return
    print(
        f"{output}: {done['groups']} groups of {group_size} responses of {done['prompts']} "
        f"prompts; left out: {few} prompts with fewer responses{_range_words(multipliers)}"
    )


def _range_facts(multipliers: "pd.Series | MultiplierRange") -> dict[str, object]:
    """Ends and floor of every λ that was drawn, for machines; nothing where λ is fixed."""
    import pandas as pd

    if isinstance(multipliers, pd.Series):
        return {}
    ends = {"low": multipliers.low, "high": multipliers.high, "floor": multipliers.floor}
    names = map(str, multipliers.center.index)
    facts = {n: {what: float(of[n]) for what, of in ends.items()} for n in names}
    return {"multipliers": facts} | ({"kappa": multipliers.kappa} if multipliers.kappa else {})


def _range_words(multipliers: "pd.Series | MultiplierRange") -> str:
    """Ends and floor of every λ that was drawn, in words; nothing where λ is fixed."""
    import pandas as pd

    if isinstance(multipliers, pd.Series):
        return ""
    words = [
        f"; λ of {name} {multipliers.low[name]:.4g} to {multipliers.high[name]:.4g}, floor "
        f"{multipliers.floor[name]:.4g}"
        for name in multipliers.center.index
    ]
    if multipliers.kappa:
        words.append(f"; κ {multipliers.kappa[0]:g} to {multipliers.kappa[1]:g}")
    return "".join(words)
