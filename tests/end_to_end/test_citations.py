"""Numbers of the paper's statements: every one that is cited is a row of docs/paper.md."""

import re
import subprocess

from tests.helpers.paths import REPO

ITEM = r"(Theorem|Lemma|Assumption|Algorithm)"
CITED = re.compile(ITEM + r"(?:s|ta)?\s+(\d+(?:(?:,\s*|\s+and\s+)\d+)*)")
ROW = re.compile(r"^\| " + ITEM + r" (\d+) \|.*\| (.*) \|$", re.MULTILINE)


def citations(text: str) -> set[str]:
    return {
        f"{kind} {number}"
        for kind, numbers in CITED.findall(text)
        for number in re.findall(r"\d+", numbers)
    }


def test_every_cited_statement_is_a_row_of_the_papers_table():
    rows = {
        f"{kind} {number}": here
        for kind, number, here in ROW.findall((REPO / "docs/paper.md").read_text())
    }
    assert len(rows) == 22 and "Theorem 5" in rows
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    files = [n for n in listed.stdout.split() if n.endswith((".py", ".md", ".yaml"))]
    assert len(files) > 200
    unlisted = {
        name: missing
        for name in files
        if (missing := citations((REPO / name).read_text()) - set(rows))
    }
    assert not unlisted
    for here in rows.values():
        for path in re.findall(r"`([\w/]+\.(?:py|yaml))`", here):
            assert (REPO / path).is_file(), path


def test_plural_citations_are_read():
    cited = citations("by Theorems 3 and 4, Lemmas 7, 8 and\n 9; Lemma A, 5 Theorems, Algorithm 1.")
    numbers = {"Theorem": (3, 4), "Lemma": (7, 8, 9), "Algorithm": (1,)}
    assert cited == {f"{kind} {n}" for kind, several in numbers.items() for n in several}
