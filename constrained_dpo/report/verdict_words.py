"""What a verdict means, and what it rests on, in words."""

from constrained_dpo.estimates.measure import Measurement

MEANING = {
    "satisfied": "even u's lower bound is above 0, on fresh answers to unseen prompts",
    "undecided": "0 lies between u's bounds; more test prompts would decide",
    "violated": "even u's upper bound is below 0, on fresh answers to unseen prompts",
}


def basis(measured: Measurement, confidence: float) -> list[str]:
    """Say at which confidence a verdict was held and why, and which bounds were only seen.

    confidence: that of all verdicts together (dual.confidence).
    """
    lines = []
    if measured.verdict_confidence > confidence + 1e-9:
        lines.append(
            f"held at {100 * measured.verdict_confidence:.4g} %, so that all looks at these "
            f"prompts together hold at {100 * confidence:g} %"
        )
    if measured.bounds_seen:
        names = " and ".join(measured.bounds_seen)
        lines.append(
            f"{names}: no range is stated (scorer option `range`), so its worst case is the worst "
            "that this run has seen"
        )
    return lines
