"""Categories of prompts: what a column says, which stand alone, that they stay with the prompts."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from data_prep.prompts.categories import categories_of, category_counts, category_name, pooled
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import read_prompt_table, split_prompts
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo


@pytest.mark.parametrize(
    ("value", "categories"),
    [
        ("weapons", ["weapons"]),
        (["b", "a", "b"], ["a", "b"]),
        ({"Violence": True, "Privacy": False, "Drugs": True}, ["Drugs", "Violence"]),
        (None, []),
        ("", []),
        ([], []),
    ],
)
def test_a_column_names_a_prompts_categories(value, categories):
    assert categories_of({"kind": value}, "kind") == categories


@pytest.mark.parametrize("value", [3, True, [1], {"a": 1}, {"a": "yes"}])
def test_what_is_no_category_is_refused(value):
    with pytest.raises(ValueError, match="a category is a text"):
        categories_of({"kind": value}, "kind")


def test_a_missing_column_names_the_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "kind": "x"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match=r"line 2: no `kind` \(it has prompt\)"):
        read_prompt_table(str(path), "text", ["kind"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_categories_stay_with_their_prompts_and_duplicates_unite(tmp_path, ending):
    rows = [{"prompt": f"p{i}", "kind": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    rows.append({"prompt": "p3", "kind": "third"})
    path = tmp_path / f"p.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    table, left_out = split_prompts(PromptSettings(source=str(path), test=0.5), 8, ["kind"])
    assert left_out["duplicates"] == 1 and len(table) == 40
    kinds = dict(zip(table["prompt"], table["kind"], strict=True))
    assert kinds["p3"] == ["odd", "third"] and kinds["p4"] == ["even"]
    counts = category_counts(table, "kind")
    assert counts.loc["even"].sum() == 20 and counts.loc["third"].sum() == 1


def counts(**values: tuple[int, int]) -> pd.DataFrame:
    rows = {name: {"fit": 9, "dual": d, "test": t} for name, (d, t) in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def test_small_categories_are_pooled():
    names = pooled(counts(big=(9, 9), few_dual=(3, 9), few_test=(9, 7)), 8, "g.by")
    assert names == {"big": ["big"], "other": ["few_dual", "few_test"]}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (counts(big=(9, 9), a=(1, 2), b=(2, 3)), "a, b have 3 dual and 5 test prompts together"),
        (counts(**{"a b": (9, 9), "a-b": (9, 9)}), "a b and a-b would be called a_b"),
        (counts(other=(9, 9), a=(1, 9), b=(9, 1)), "would be called other, which pools"),
        (counts(), "no prompt has a category"),
    ],
)
def test_categories_that_cannot_be_constrained_are_refused(table, words):
    with pytest.raises(UserError, match=words):
        pooled(table, 8, "g.by")


def test_a_categorys_name_fits_a_column():
    assert category_name("Violence, Aiding & Abetting") == "Violence_Aiding_Abetting"
    assert category_name("…") == "_"


def test_a_prompts_table_keeps_the_columns_that_are_named(tmp_path):
    rows = [{"prompt": f"p{i}", "kind": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    path, output = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cdpo("data", "prompts", path, "-o", output, "--categories", "kind", check=0)
    table = read_parquet(output)
    assert {p: list(k) for p, k in zip(table["prompt"], table["kind"], strict=True)}["p3"] == [
        "odd"
    ]
