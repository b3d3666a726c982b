"""What a recipe can say of any scorer: negate, indicator, clip."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.scoring import apply_options, make_scorer, score_texts
from data_prep.scorers.settings import PythonScorerSettings
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART


def test_options_apply_after_negation():
    scores = np.array([[-2.0, 0.0], [0.5, 3.0]])
    applied = lambda **options: apply_options(scores, ScorerOptions(**options)).tolist()
    assert applied() == scores.tolist()
    assert applied(negate=True) == [[2, 0], [-0.5, -3]]
    assert applied(indicator=0.0) == [[0, 1], [1, 1]]
    assert applied(negate=True, indicator=0.0) == [[1, 1], [0, 0]]
    assert applied(negate=True, clip=[-1, 1]) == [[1, 0], [-0.5, -1]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("{indicator: 0, clip: [0, 1]}", "harmless.scorer: indicator and clip: give one of them"),
        ("{clip: [1, 1]}", "clip is [1.0, 1.0]; write [low, high] with low < high"),
        ("{clip: [1]}", "clip: list should have at least 2 items"),
        ("{indicator: yes please}", "indicator: input should be a valid number"),
    ],
)
def test_options_that_contradict_themselves_name_their_key(options, match):
    block = options.replace("{", '{type: python, target: "data_prep.quickstart:harmless", ')
    with pytest.raises(UserError) as error:
        load_recipe(QUICKSTART, [f"objective.constraints.harmless.scorer={block}"])
    message = str(error.value).replace("constraints.0", "harmless")
    assert match in message and len(message.splitlines()) == 1


def test_the_cache_keeps_raw_scores_so_that_options_cost_nothing(tmp_path):
    log = tmp_path / "calls"
    code = f"""
def f(p, r):
    open({str(log)!r}, 'a').write('x' * len(r))
    return [float(x) for x in r]
"""
    (tmp_path / "s.py").write_text(code)
    scorer = make_scorer(PythonScorerSettings(type="python", target=f"{tmp_path / 's.py'}:f"))
    cache = ScoreCache(tmp_path / "scores.sqlite")

    def scored(**options):
        how = {"options": ScorerOptions(**options), "name": "g", "cache": cache}
        return score_texts(scorer, ["p"] * 3, ["-1", "0.5", "2"], **how).tolist()

    assert scored(clip=[0, 1]) == [0, 0.5, 1]
    assert scored(indicator=0.5) == [0, 1, 1]
    assert scored(negate=True, indicator=0) == [1, 0, 0]
    assert scored() == [-1, 0.5, 2] and log.read_text() == "xxx"


def test_a_column_scorer_takes_options_too(tmp_path):
    table, output = tmp_path / "t.csv", tmp_path / "o.parquet"
    costs = {"prompt": "p", "response": ["a", "b", "c"], "cost": [-3.0, 1.0, 0.0]}
    pd.DataFrame(costs).to_csv(table, index=False)
    scorer = f"{{type: column, file: {table}, column: cost, negate: true, indicator: 0}}"
    cdpo("data", "score", table, "--name", "safe", "--scorer", scorer, "-o", output, check=0)
    assert pd.read_parquet(output)["safe"].tolist() == [1, 0, 1]
