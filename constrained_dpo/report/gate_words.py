"""A gate's result for readers and for other programs: text, Markdown, JUnit XML."""

from xml.etree import ElementTree

from constrained_dpo.gate.record import FAILED, PASSED, UNDECIDED, CheckResult, GateRecord
from constrained_dpo.report.contents import signed

MARKS = {PASSED: "✅", FAILED: "❌", UNDECIDED: "❔"}


def gate_lines(record: GateRecord) -> list[str]:
    """Say the verdict and every check, a line each."""
    width = max(len(check.title) for check in record.checks)
    lines = [f"gate      {record.verdict}: {_meaning(record)}"]
    lines += [
        f"{check.verdict:9} {check.title:{width}}  {check.claim}; {check_words(check)}"
        for check in record.checks
    ]
    return lines + gate_notes(record)


def _meaning(record: GateRecord) -> str:
    percent = f"{100 * record.confidence:g} %"
    if record.verdict == PASSED:
        return f"every check holds, at {percent} for the whole gate"
    names = ", ".join(c.title for c in record.checks if c.verdict == record.verdict)
    if record.verdict == FAILED:
        return f"{names} does not hold, at {percent}"
    return f"{names} may hold or not, after {record.size} prompts"


def check_words(check: CheckResult) -> str:
    """Say what was measured: both means, the room with its bounds, and on how many prompts."""
    low, high = (
        "−∞" if check.low is None else signed(check.low),
        "∞" if check.high is None else signed(check.high),
    )
    measured = f"{check.reference:.4g} → {check.policy:.4g}, room {signed(check.room)}"
    prompts = "" if check.num_prompts is None else f", {check.num_prompts} prompts"
    return f"{measured} [{low}, {high}]{prompts}"


def gate_notes(record: GateRecord) -> list[str]:
    """Say what a reader has to know beside the numbers."""
    notes = []
    seen = [check.title for check in record.checks if not check.bounded]
    if seen:
        notes.append(
            f"{', '.join(seen)}: no range is stated (scorer option `range`), so the worst case is "
            "the worst that was seen"
        )
    if any(record.left_out.values()):
        counts = ", ".join(f"{count} {why}" for why, count in record.left_out.items())
        notes.append(f"prompts left out: {counts}")
    if record.verdict == UNDECIDED and record.sessions:
        most = max(record.available.values())
        notes.append(
            f"{most} prompts are there: `--until-decided --budget {most}` looks at more"
            if record.size < most
            else "all prompts are used: give more in `prompts`, or more `responses`"
        )
    return notes


def gate_markdown(record: GateRecord, policy: str) -> str:
    """Write the result as Markdown; policy: what was judged, in words."""
    lines = [
        f"## {MARKS[record.verdict]} gate {record.verdict}: {_escaped(policy)}",
        "",
        f"{_escaped(_meaning(record))}.",
        "",
        "| check | claim | reference → policy | room | bounds | prompts | |",
        "|---|---|---|---|---|---|---|",
    ]
    for check in record.checks:
        low = "−∞" if check.low is None else signed(check.low)
        high = "∞" if check.high is None else signed(check.high)
        cells = (
            check.title,
            check.claim,
            f"{check.reference:.4g} → {check.policy:.4g}",
            signed(check.room),
            f"[{low}, {high}]",
            "" if check.num_prompts is None else str(check.num_prompts),
            f"{MARKS[check.verdict]} {check.verdict}",
        )
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    lines += ["", *(f"- {_escaped(note)}" for note in gate_notes(record))]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(text: str) -> str:
    """A text as a cell: no column and no markup begins in it."""
    for character in "\\|<>*_":
        text = text.replace(character, f"\\{character}")
    return text


def gate_junit(record: GateRecord, policy: str) -> bytes:
    """Write the result as JUnit XML: a test case for each check.

    An undecided check is an error: what is not shown is no pass.
    """
    checks = record.checks
    suite = ElementTree.Element(
        "testsuite",
        name=f"cdpo gate {policy}",
        tests=str(len(checks)),
        failures=str(sum(check.verdict == FAILED for check in checks)),
        errors=str(sum(check.verdict == UNDECIDED for check in checks)),
        skipped="0",
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=check.title)
        words = f"{check.claim}: {check_words(check)}"
        if check.verdict != PASSED:
            kind = "failure" if check.verdict == FAILED else "error"
            ElementTree.SubElement(case, kind, type=check.verdict, message=words)
        ElementTree.SubElement(case, "system-out").text = words
    return _document(suite)


def unfinished_junit() -> bytes:
    """Write what a gate's file says until the gate has ended: an error, never an old pass."""
    suite = ElementTree.Element(
        "testsuite", name="cdpo gate", tests="1", failures="0", errors="1", skipped="0"
    )
    case = ElementTree.SubElement(suite, "testcase", classname="gate", name="gate")
    ElementTree.SubElement(case, "error", type="unfinished", message="the gate did not end")
    return _document(suite)


UNFINISHED = "## ❔ gate unfinished\n\nThe gate did not end; its command says why.\n"
"""What a gate's Markdown says until the gate has ended."""


def _document(suite: ElementTree.Element) -> bytes:
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return bytes(ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)) + b"\n"
