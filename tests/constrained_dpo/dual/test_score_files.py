"""Files of scores: whose samples they are, how those of another policy are weighted, what is
refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from constrained_dpo.dual.one_shot import solve_one_shot
from constrained_dpo.dual.score_files import read_scores
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.errors import UserError
from tests.helpers.tables import scored_frame


def weighted_frame(prompts: int = 40, responses: int = 4000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same prompts sampled by π_ref and by another policy q that prefers high g (Gaussian
    scores, exact log-probabilities)."""
    rng = np.random.default_rng(0)
    ids = np.repeat([f"p{i}" for i in range(prompts)], responses)
    shift = np.repeat(rng.normal(size=prompts), responses)
    tables = []
    for mean in (0.0, 0.5):
        z = rng.normal(size=len(ids)) + mean
        frame = pd.DataFrame(
            {"prompt_id": ids, "r": rng.normal(size=len(ids)) - 0.5 * z, "g": z + shift}
        )
        tables.append(frame.assign(sample_logp=-0.5 * (z - mean) ** 2, ref_logp=-0.5 * z**2))
    return tables[0], tables[1]


def test_samples_of_another_policy_are_weighted(tmp_path):
    """λ* and ḡ_ref from weighted samples of q are those of π_ref; unweighted they are not."""
    reference, other = weighted_frame()
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.3),))
    other.assign(source="round:3").to_parquet(tmp_path / "q.parquet")
    read = read_scores(tmp_path / "q.parquet", problem)
    assert "weighted" in read.taken_as
    # Self-normalised: the mean of g under π_ref, to its sampling error (0.004); under q it is
    # 0.5 higher.
    assert read.table.reference_means()[0] == pytest.approx(reference["g"].mean(), abs=0.02)
    weighted, plain = (
        solve_one_shot(read.table, problem),
        solve_one_shot(ScoreTable.from_frame(reference, problem), problem),
    )
    assert weighted.lambda_["g"] == pytest.approx(plain.lambda_["g"], abs=0.03)
    assert weighted.utilities["g"] == pytest.approx(read.table.reference_means()[0] + 0.3, abs=1e-9)
    assert weighted.kl == pytest.approx(plain.kl, abs=0.02)
    absolute = ConstrainedProblem("r", 1.0, (Constraint("g", threshold=0.8),))
    ignored = solve_one_shot(
        read_scores(tmp_path / "q.parquet", absolute, assume_reference=True).table, absolute
    )
    right = solve_one_shot(read_scores(tmp_path / "q.parquet", absolute).table, absolute)
    assert right.lambda_["g"] > ignored.lambda_["g"] + 0.2


def test_which_rows_are_the_reference_policys(tmp_path):
    problem = ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.1),))
    frame = scored_frame(0, 6, 4)
    logps = {"sample_logp": -3.0, "ref_logp": -2.0}

    def read(table, **options):
        table.to_parquet(tmp_path / "t.parquet")
        table.to_csv(tmp_path / "t.csv", index=False)
        one, other = (
            read_scores(tmp_path / f"t.{kind}", problem, **options) for kind in ("parquet", "csv")
        )
        np.testing.assert_array_equal(one.table.log_weight, other.table.log_weight)
        assert one.taken_as == other.taken_as
        return one

    def refused(table, match):
        for kind, write in (
            ("parquet", table.to_parquet),
            ("csv", lambda path: table.to_csv(path, index=False)),
        ):
            write(tmp_path / f"bad.{kind}")
            with pytest.raises(UserError, match=match):
                read_scores(tmp_path / f"bad.{kind}", problem)

    assert read(frame.assign(source="reference")).taken_as is None
    same = frame.assign(source="reference", sample_logp=-2.0, ref_logp=-2.0)
    assert read(same).taken_as is None and read(same).table.log_weight.max() == 0.0
    tempered = read(frame.assign(source="reference", **logps))
    assert "another temperature" in tempered.taken_as
    assert tempered.table.log_weight.tolist() == [1.0] * 24
    assert "taken as the reference policy's" in read(frame).taken_as
    assert read(frame.assign(**logps)).table.log_weight.tolist() == [1.0] * 24
    assert (
        read(
            frame.assign(source=["reference"] * 12 + ["round:1"] * 12, **logps)
        ).table.log_weight.tolist()
        == [1.0] * 24
    )
    mixed = frame.assign(source=["reference"] * 12 + ["dataset"] * 12, **logps)
    mixed.loc[20, "sample_logp"] = np.nan
    refused(mixed, "not the reference policy's.*--assume-reference")
    refused(mixed.drop(columns="source"), "not known in every row.*--assume-reference")
    refused(frame.assign(source=[None] * 24), "not the reference policy's")
    assert "--assume-reference" in read(mixed, assume_reference=True).taken_as
    assert "taken as" in read(frame.assign(sample_logp=np.nan, ref_logp=np.nan)).taken_as


@pytest.mark.parametrize("broken", ["truncated", "nan", "null id", "words", "missing", "empty"])
def test_broken_parquet_files_are_named(broken, tmp_path):
    frame, path = scored_frame(0, 6, 4), tmp_path / "t.parquet"
    match = {
        "nan": "column g is not a finite number in 'y5'",
        "null id": "prompt_id is null in row 3",
        "missing": "missing column g",
    }
    match |= {
        "words": "column g is not a finite number",
        "truncated": "t.parquet: not a readable parquet",
        "empty": "no rows",
    }
    if broken == "nan":
        frame.loc[5, "g"] = np.nan
    elif broken == "null id":
        frame.loc[3, "prompt_id"] = None
    elif broken == "words":
        frame["g"] = "good"
    elif broken == "missing":
        frame = frame.drop(columns="g")
    (frame.head(0) if broken == "empty" else frame).to_parquet(path)
    if broken == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=match[broken]):
        read_scores(path, ConstrainedProblem("r", 1.0, (Constraint("g", margin=0.1),)))


def test_tables_at_another_temperature_are_weighted_and_truncated_ones_refused(tmp_path):
    """π_ref on ten answers: samples at T = 1.5 give its D(λ) once they are weighted; top_p .8 never
    draws three of the answers, which no weight makes good."""
    rng = np.random.default_rng(0)
    logp = np.log(np.array([0.3, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05, 0.04, 0.03, 0.03]))
    reward, g = rng.normal(size=10), rng.normal(size=10)
    problem = ConstrainedProblem("r", 0.5, (Constraint("g", threshold=0.2),))
    hot = logp / 1.5 - np.logaddexp.reduce(logp / 1.5)
    cut = np.where(np.arange(10) < 7, logp, -np.inf)
    cut = cut - np.logaddexp.reduce(cut)

    def table(law: np.ndarray, name: str) -> Path:
        drawn = rng.choice(10, 300 * 64, p=np.exp(law))
        pd.DataFrame(
            {
                "prompt_id": np.repeat([f"p{i}" for i in range(300)], 64),
                "r": reward[drawn],
                "g": g[drawn],
                "source": "reference",
                "sample_logp": law[drawn],
                "ref_logp": logp[drawn],
            }
        ).to_parquet(tmp_path / name)
        return tmp_path / name

    read = read_scores(table(hot, "hot.parquet"), problem)
    weighted, ignored = (
        solve_one_shot(t, problem).dual_value
        for t in (read.table, read_scores(tmp_path / "hot.parquet", problem, True).table)
    )
    exact = minimize_scalar(
        lambda lam: 0.5 * np.logaddexp.reduce(logp + (reward + lam * g) / 0.5) - 0.2 * lam,
        bounds=(0, 20),
    ).fun
    assert weighted == pytest.approx(exact, abs=0.02) and abs(ignored - exact) > 0.04
    with pytest.raises(UserError, match=r"truncated law .* covers about 90 % of the reference"):
        read_scores(table(cut, "cut.parquet"), problem)
