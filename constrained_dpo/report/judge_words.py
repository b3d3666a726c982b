"""What a judge said, in words."""

from typing import Any

from constrained_dpo.evaluation.judge import CRITERIA


def judgement_lines(title: str, record: dict[str, Any], other: str) -> list[str]:
    """What the judge found on one set of prompts, in words."""
    lines = [f"{title}, judged by {record['model']} against {other}:"]
    for criterion in CRITERIA:
        result = record[criterion]
        rate = _percent(result["rate"], result["interval"])
        lines.append(
            f"  {criterion}: preferred in {rate} of {result['prompts']} prompts ({result['wins']} "
            f"wins, {result['ties']} ties, "
            f"{result['losses']} losses); {result['unreadable_pairs']} pairs left out, because the "
            "judge gave no verdict"
        )
        if result["first_place"] is not None:
            first = _percent(result["first_place"])
            lines.append(
                f"    {first} of its decisions chose what stood first; {result['orders_disagree']} "
                "pairs change with the order"
            )
    result = record["refusals"]
    lines.append(
        f"  declines: {_percent(result['policy'])} of the policy's answers, "
        f"{_percent(result['other'])} of the other's, difference "
        f"{_percent(result['difference'], result['interval'])}; {result['unreadable_pairs']} pairs "
        "left out"
    )
    if any(record.get("left_out", {}).values()):
        lines.append(f"  {left_out_line(record['left_out'])}")
    return lines


def left_out_line(counts: dict[str, int]) -> str:
    """How many prompts were left out, by reason, in words."""
    return f"prompts left out: {', '.join(f'{n} {why}' for why, n in counts.items())}"


def _percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    if share is None:
        return "no answer"
    spread = "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    return f"{100 * share:.0f} %{spread}"
