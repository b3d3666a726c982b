"""Labels under a range of multipliers: scores that table and pool alone give again, and what the
draws depend on."""

import json

import numpy as np
import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.labels.groups import label_groups
from data_prep.labels.multipliers import KAPPA, MultiplierRange, multiplier_floor
from data_prep.labels.pair_texts import PairTexts
from data_prep.labels.preferences import label_pairs
from data_prep.labels.relabel import relabel_groups, relabel_pairs
from data_prep.tables import GROUPS, PAIRS, validate_groups, validate_pairs
from tests.helpers.cli import cdpo
from tests.helpers.multipliers import DRAWN, RANGE, frame_of, range_of
from tests.helpers.tables import scored_frame


def pairs_of(frame, lambda_=RANGE, labels="soft", seed=0, round_number=0, count=None):
    return label_pairs(
        frame,
        "r",
        lambda_,
        labels=labels,
        pairs_per_prompt=count,
        seed=seed,
        round_number=round_number,
    )


def groups_of(frame, lambda_=RANGE, seed=0, round_number=0):
    sizes = {"group_size": 3, "groups_per_prompt": 4}
    return label_groups(frame, "r", lambda_, **sizes, seed=seed, round_number=round_number)


@pytest.mark.parametrize("labels", ["soft", "bernoulli", "argmax"])
def test_pairs_stand_under_their_own_multipliers(labels):
    frame = frame_of()
    pairs = validate_pairs(pairs_of(frame, labels=labels), "pairs")
    assert list(pairs) == [*PAIRS, *DRAWN]
    assert pairs["lambda/g"].nunique() == len(pairs) == 40 * 15
    by_id = frame.set_index("response_id")

    def score(side):
        response = by_id.loc[pairs[side]].reset_index()
        reward, g, h = (response[name] for name in ("r", "g", "h"))
        return reward + pairs["lambda/g"] * g + pairs["lambda/h"] * h  # κ is no part of it

    margin = score("chosen_id") - score("rejected_id")
    pd.testing.assert_series_equal(pairs["margin"], margin, check_names=False, check_exact=True)
    np.testing.assert_allclose(pairs["prob"], 1 / (1 + np.exp(-margin)), atol=1e-12)
    if labels == "argmax":
        assert (pairs["margin"] > 0).all()


def test_bernoulli_labels_are_drawn_under_the_pair_s_own_multiplier():
    frame = scored_frame(2, 1500, 5).assign(r=0.0)
    pairs = pairs_of(frame, range_of(g=(1.0, 1e-3), factor=8.0), "bernoulli")
    higher = pairs["margin"] > 0  # chosen with P = σ(|margin|) of the pair's own λ
    expected = 1 / (1 + np.exp(-pairs["margin"].abs()))
    for part in (pairs["lambda/g"] < 0.5, pairs["lambda/g"] > 2):
        error = (higher - expected)[part]
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(part.sum())


def test_groups_stand_under_their_own_multipliers():
    frame = frame_of()
    groups = validate_groups(groups_of(frame), "groups")
    assert list(groups) == [*GROUPS, *DRAWN]
    assert groups.groupby("group_id")[DRAWN].nunique().eq(1).all(axis=None)
    assert groups["lambda/g"].nunique() == groups["group_id"].nunique() == 160
    of_row = frame.set_index("response_id").loc[groups["response_id"]].reset_index()
    score = of_row["r"] + groups["lambda/g"] * of_row["g"] + groups["lambda/h"] * of_row["h"]
    pd.testing.assert_series_equal(groups["score"], score, check_names=False, check_exact=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_multiplier_is_null_where_its_utility_does_not_concern_the_prompt(grouped, tmp_path):
    law = range_of(g=(0.4, 0.05), **{"h.a": (0.3, 0.05), "h.b": (0.3, 0.05)})
    frame = frame_of().drop(columns="h")
    number, score = frame["prompt_id"].str[1:].astype(int), np.arange(len(frame)) / 100
    frame["h.a"] = np.where(number % 3 == 0, score, np.nan)  # of the others none, or h.b
    frame["h.b"] = np.where(number % 3 == 1, -score, np.nan)
    labels = groups_of(frame, law) if grouped else pairs_of(frame, law)
    path, output = tmp_path / "frame.parquet", tmp_path / "labels.parquet"
    frame.to_parquet(path)
    if grouped:
        relabel_groups(path, output, "r", law, group_size=3, groups_per_prompt=4, seed=0)
    else:
        relabel_pairs(path, output, "r", law, labels="soft", pairs_per_prompt=None, seed=0)
    written = pd.read_parquet(output)[list(labels)]
    pd.testing.assert_frame_equal(written, labels, check_exact=True)
    validate = validate_groups if grouped else validate_pairs
    validate(labels, "labels")
    kind = labels["prompt_id"].str[1:].astype(int) % 3
    assert labels["lambda/g"].notna().all()
    assert (labels["lambda/h.a"].notna() == (kind == 0)).all()
    assert (labels["lambda/h.b"].notna() == (kind == 1)).all()
    by_id = frame.set_index("response_id")

    def total(column: str) -> np.ndarray:
        of_row = by_id.loc[labels[column]]
        terms = (labels[f"lambda/{n}"].to_numpy() * of_row[n].to_numpy() for n in law.center.index)
        return of_row["r"].to_numpy() + sum(np.nan_to_num(term) for term in terms)

    if grouped:
        np.testing.assert_allclose(labels["score"], total("response_id"), rtol=1e-12)
    else:
        margin = total("chosen_id") - total("rejected_id")
        np.testing.assert_allclose(labels["margin"], margin, rtol=1e-9)
    with pytest.raises(UserError, match=r"lambda/h\.a is not a finite number"):
        validate(labels.assign(**{"lambda/h.a": np.where(kind == 0, -1.0, np.nan)}), "labels")


@pytest.mark.parametrize("label", [pairs_of, groups_of])
def test_draws_depend_on_seed_round_and_ids_but_not_on_the_table(label):
    frame = frame_of()
    whole = label(frame)
    shuffled = label(frame.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(shuffled, whole, check_exact=True)
    some = label(frame[frame["prompt_id"].isin(["p1", "p7"])])
    same = whole[whole["prompt_id"].isin(["p1", "p7"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, same, check_exact=True)
    for other in (label(frame, seed=1), label(frame, round_number=1)):
        assert not np.isin(other["lambda/g"], whole["lambda/g"]).any()


def test_a_pair_s_multiplier_does_not_depend_on_who_wins():
    def by_pair(labels):
        pairs = pairs_of(frame_of(), labels=labels)
        ids = zip(pairs["chosen_id"], pairs["rejected_id"], strict=True)
        return pairs[DRAWN].set_axis(["/".join(sorted(pair)) for pair in ids]).sort_index()

    pd.testing.assert_frame_equal(by_pair("bernoulli"), by_pair("soft"), check_exact=True)


def test_fixed_multipliers_add_no_column_and_change_no_bit():
    frame, lambda_ = frame_of(), pd.Series({"g": 0.4, "h": 0.3})
    score = frame.set_index("response_id")
    score = score["r"] + 0.4 * score["g"] + 0.3 * score["h"]
    pairs, groups = pairs_of(frame, lambda_), groups_of(frame, lambda_)
    assert (list(pairs), list(groups)) == ([*PAIRS], [*GROUPS])
    margin = score[pairs["chosen_id"]].to_numpy() - score[pairs["rejected_id"]].to_numpy()
    assert (pairs["margin"] == margin).all()
    assert (groups["score"].to_numpy() == score[groups["response_id"]].to_numpy()).all()


def test_files_hold_the_draws_of_the_whole_table(tmp_path, monkeypatch):
    frame, path, output = frame_of(), tmp_path / "s.parquet", tmp_path / "o.parquet"
    frame.assign(prompt="ask", response="say").to_parquet(path)
    monkeypatch.setattr("data_prep.labels.preferences.PIECE_PAIRS", 100)
    monkeypatch.setattr("data_prep.labels.relabel.GROUPS_AT_ONCE", 20)
    rule = {"labels": "soft", "pairs_per_prompt": 4, "seed": 5}
    relabel_pairs(path, output, "r", RANGE, **rule, texts=PairTexts())
    written = pd.read_parquet(output)
    assert list(written) == [*PAIRS, "prompt", "chosen", "rejected", *DRAWN]
    whole = pairs_of(frame, seed=5, count=4)
    pd.testing.assert_frame_equal(written[list(whole)], whole, check_exact=True)
    relabel_groups(path, output, "r", RANGE, group_size=3, groups_per_prompt=4, seed=5)
    whole = groups_of(frame, seed=5)
    pd.testing.assert_frame_equal(pd.read_parquet(output), whole, check_exact=True)


def test_tables_with_bad_multipliers_are_refused():
    pairs, groups = pairs_of(frame_of()), groups_of(frame_of())
    for column, value, sign in [("lambda/g", -0.1, "≥"), (KAPPA, 0.0, ">"), (KAPPA, None, ">")]:
        for validate, table in ((validate_pairs, pairs), (validate_groups, groups)):
            bad = table.assign(**{column: table[column].where(table.index != 4, value)})
            with pytest.raises(UserError, match=f"{column} is not a finite number {sign} 0 in 'y"):
                validate(bad, "t")
    other = groups.assign(**{"lambda/h": groups["lambda/h"].where(groups.index != 4, 0.3)})
    with pytest.raises(UserError, match="lambda/h differs within the group of 'p0/1'"):
        validate_groups(other, "t")


def test_responses_without_a_utility_are_refused():
    with pytest.raises(UserError, match="missing column h"):
        pairs_of(frame_of().drop(columns="h"))
    with pytest.raises(UserError, match="column h is not a finite number in 'y3'"):
        groups_of(frame_of().assign(h=lambda f: f["h"].where(f.index != 3)))


@pytest.fixture
def command(tmp_path):
    frame_of().to_parquet(tmp_path / "s.parquet")
    relabel = ["data", "relabel", tmp_path / "s.parquet", "--reward", "r"]
    return lambda *options, check=0: cdpo(
        *relabel, "-o", tmp_path / "o.parquet", *options, check=check
    )


def test_relabel_draws_multipliers_from_the_shell(command, tmp_path):
    frame = frame_of()
    law = ["--lambda", "g=0.4", "--lambda", "h=0", "--range", "3", "--floor", "g=0.05"]
    floor = pd.Series({"g": 0.05, "h": multiplier_floor(frame, "r", ["h"])["h"]})
    expected = MultiplierRange(pd.Series({"g": 0.4, "h": 0.0}), floor, 3.0, (0.5, 1.5))
    facts = json.loads(command(*law, "--kappa", "0.5:1.5", "--json").stdout)
    pairs = pairs_of(frame, expected)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "o.parquet"), pairs, check_exact=True)
    assert facts["multipliers"]["g"] == {"low": 0.4 / 3, "high": 0.4 * 3.0, "floor": 0.05}
    assert facts["multipliers"]["h"] == {"low": 0.0, "high": floor["h"] * 3, "floor": floor["h"]}
    assert facts["kappa"] == [0.5, 1.5]
    groups = [*law, "--group-size", "3", "--groups-per-prompt", "4"]
    words = command(*groups).stdout
    assert "λ of g 0.1333 to 1.2, floor 0.05" in words
    assert f"λ of h 0 to {3 * floor['h']:.4g}, floor {floor['h']:.4g}" in words
    expected = MultiplierRange(expected.center, floor, 3.0)
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "o.parquet"), groups_of(frame, expected), check_exact=True
    )
    assert "λ" not in command("--lambda", "g=0.4").stdout


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--range", "3"], "--range: there is no λ to draw; add --lambda"),
        (["--lambda", "g=1", "--floor", "g=1"], "--floor: is of a range of multipliers; add"),
        (["--lambda", "g=1", "--kappa", "1:2"], "--kappa: is of a range of multipliers; add"),
        (["--lambda", "g=1", "--range", "1"], "the factor is 1.0; give a finite number > 1"),
        (["--lambda", "g=1", "--range", "3", "--floor", "h=1"], "--floor h: has no --lambda"),
        (["--lambda", "g=1", "--range", "3", "--kappa", "2"], "--kappa 2: write LOW:HIGH"),
        (["--lambda", "g=1", "--range", "3", "--kappa", "2:1"], "range of κ is 2.0 to 1.0"),
        (["--lambda", "x=1", "--range", "3"], "missing column x"),
    ],
)
def test_wrong_options_are_one_line(command, options, match, tmp_path):
    error = command(*options, check=2).stderr
    assert match in error and len(error.splitlines()) == 1
    assert not (tmp_path / "o.parquet").exists()
