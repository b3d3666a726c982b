"""Scorers with a mistake, kind by kind, through the real command line: one line that says what and
where; exit 2; nothing written."""

import json

import pandas as pd
import pytest


@pytest.fixture
def refuse(refused, answers, tmp_path):
    """Asserts that a scorer is refused, and that no table is written; returns the line."""
    output = tmp_path / "out.parquet"

    def score(scorer: str, *, match: str, name: str = "n") -> str:
        how = ("--name", name, "--scorer", scorer)
        line = refused("data", "score", answers, "-o", output, *how, match=match)
        assert not output.exists()
        return line

    return score


FUNCTIONS = {
    "wrong count": ("def f(p, r): return [0.0]", "for 3 responses"),
    "a table of scores": ("def f(p, r): return [[0.0, 1.0]] * len(r)", "for 3 responses"),
    "None": ("def f(p, r): return None", "scorer"),
    "None among numbers": ("def f(p, r): return [1.0, None, 2.0]", "scorer"),
    "words": ("def f(p, r): return ['good'] * len(r)", "did not return numbers"),
    "NaN": ("def f(p, r): return [float('nan')] * len(r)", "must be finite"),
    "infinity": ("def f(p, r): return [1.0, float('-inf'), 0.0]", "must be finite"),
    "raises": ("def f(p, r): raise KeyError('x')", "raised KeyError"),
    "raises on two lines": ("def f(p, r): raise ValueError('one\\ntwo')", "raised ValueError"),
    "exits": ("def f(p, r): raise SystemExit(0)", "raised SystemExit"),
    "wrong arguments": ("def f(p): return [0.0] * len(p)", "raised TypeError"),
    "no function": ("g = 1", "has no function f"),
    "not a function": ("f = 1", "has no function f"),
    "broken file": ("def f(:", "cannot be imported (SyntaxError"),
    "import that fails": (
        "import no_such_module_at_all",
        "cannot be imported (ModuleNotFoundError",
    ),
    "no file": (None, "no such file"),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_that_cannot_score_is_refused(kind, refuse, tmp_path):
    code, match = FUNCTIONS[kind]
    if code is not None:
        (tmp_path / "s.py").write_text(code + "\n")
    scorer = json.dumps({"type": "python", "target": f"{tmp_path / 's.py'}:f"})
    line = refuse(scorer, match=match)
    assert "s.py" in line or "must be finite" in line


SETTINGS = {
    "unknown type": ("{type: pyton}", "--scorer"),
    "not a mapping": ("[1]", "--scorer"),
    "broken YAML": ("{type", "--scorer"),
    "unknown key": ("{type: python, target: 'a:b', negat: true}", "negat"),
    "target without a function": ("{type: python, target: foo}", "write file.py:function"),
    "no such module": (
        "{type: python, target: 'no_such_module.x:f'}",
        "module no_such_module.x cannot be imported",
    ),
    "module without the function": (
        "{type: python, target: 'math:nothing'}",
        "has no function nothing",
    ),
    "table that is not there": ("{type: column, file: none.csv, column: x}", "no such file"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_name_no_scorer_are_refused(kind, refuse):
    scorer, match = SETTINGS[kind]
    refuse(scorer, match=match)


def test_a_column_scorer_is_refused_a_new_text_and_a_reserved_column(refuse, tmp_path):
    table = tmp_path / "scores.csv"
    pd.DataFrame({"prompt": ["q"], "response": ["1"], "x": [1.0]}).to_csv(table)
    scorer = f"{{type: column, file: {table}, column: x}}"
    refuse(scorer, match="no row for 2 of 3 responses")
    refuse(scorer, name="response", match="reserved column name")
