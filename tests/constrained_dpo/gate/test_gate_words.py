"""A gate's result in JUnit XML and Markdown."""

from xml.etree import ElementTree

from constrained_dpo.gate.record import CheckResult, GateRecord, Look, Session
from constrained_dpo.report.gate_words import gate_junit, gate_lines, gate_markdown


def check(name: str, verdict: str) -> CheckResult:
    return CheckResult(
        kind="second_opinion",
        name=name,
        claim=f"{name} not | below <π_ref>",
        verdict=verdict,
        room=0.1,
        se=0.1,
        low=None if verdict == "undecided" else 0.02,
        high=0.2,
        policy=0.4,
        reference=0.3,
        prompts="test",
        num_prompts=40,
        decided_at=40,
        bounded=verdict == "passed",
    )


LOOK = Look(size=40, error=0.04)

RECORD = GateRecord(
    key="k",
    verdict="failed",
    confidence=0.95,
    round=1,
    adapter=None,
    available={"test": 80},
    left_out={"duplicates": 2, "too_long": 0},
    checks=[check("a", "passed"), check("b", "failed"), check("c", "undecided")],
    sessions=[Session(done=0, plan=[LOOK], looks=[LOOK])],
)


def test_junit_counts_an_undecided_check_as_an_error_and_never_as_a_pass():
    suite = ElementTree.fromstring(gate_junit(RECORD, "runs/x & y")).find("testsuite")
    assert suite is not None
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "1", "errors": "1", "skipped": "0"}
    outcomes = {c.get("name"): [e.tag for e in c if e.tag != "system-out"] for c in suite}
    assert outcomes == {
        "second_opinion a": [],
        "second_opinion b": ["failure"],
        "second_opinion c": ["error"],
    }


def test_markdown_has_a_row_for_every_check_and_no_text_becomes_markup():
    lines = gate_markdown(RECORD, "runs/x").splitlines()
    rows = [line for line in lines if line.startswith("| second")]
    assert len(rows) == 3 and all("\\|" in row and "\\<π\\_ref\\>" in row for row in rows)
    assert all(row.replace("\\|", "").count("|") == 8 for row in rows)


def test_the_text_names_what_failed_and_what_was_left_out():
    text = "\n".join(gate_lines(RECORD))
    assert "failed: second_opinion b does not hold" in text and "2 duplicates" in text
