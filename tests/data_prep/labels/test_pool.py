"""Which responses a round trains on: shares, hard cases, caps."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.recipe.load import load_recipe
from data_prep.errors import UserError
from data_prep.labels.pool import choose_responses
from tests.helpers.paths import QUICKSTART
from tests.helpers.tables import scored_frame

LAMBDA = pd.Series({"g": 0.7})
ALL = {"reference": 0.25, "recent": 0.25, "hard": 0.25, "earlier": 0.25}


def pool_of(counts: dict[str, int], prompts: int = 5, seed: int = 0) -> pd.DataFrame:
    """counts: responses of every prompt by source."""
    tables = []
    for number, (source, count) in enumerate(counts.items()):
        table = scored_frame(seed + number, prompts, count).assign(source=source)
        tables.append(table.assign(response_id=[f"{source}/{i}" for i in range(len(table))]))
    pool = pd.concat(tables, ignore_index=True)
    rng = np.random.default_rng(seed)
    return pool.assign(
        ref_logp=rng.normal(-5, 1, len(pool)), policy_logp=rng.normal(-5, 1, len(pool))
    )


def choose(pool, shares, cap=None, seed=0, round_number=3):
    return choose_responses(
        pool,
        shares,
        cap,
        reward="r",
        lambda_=LAMBDA,
        beta=0.5,
        seed=seed,
        round_number=round_number,
    )


def by_source(chosen) -> pd.DataFrame:
    return chosen.groupby(["prompt_id", "source"]).size().unstack(fill_value=0)


def test_without_shares_the_pool_is_itself_and_a_cap_keeps_a_random_part():
    pool = pool_of({"reference-pool": 8, "round:0": 6})
    assert choose(pool, None) is pool
    capped = choose(pool, None, cap=5)
    assert capped.groupby("prompt_id").size().eq(5).all() and len(set(capped["source"])) == 2
    later = choose(pool, None, cap=5, round_number=4)
    assert not capped["response_id"].equals(later["response_id"])


def test_shares_are_exact_and_nothing_comes_twice():
    pool = pool_of({"reference-pool": 40, "round:0": 30, "round:1": 30, "round:2": 64})
    counts = by_source(choose(pool, ALL))
    # 40 π_ref responses at a quarter allow 160; the 60 earlier ones 240; the last 64 at one
    # half 128.
    assert (counts["reference-pool"] == 32).all() and (counts["round:2"] == 64).all()
    assert (counts["round:0"] + counts["round:1"] == 32).all() and counts["round:0"].gt(0).all()
    capped = by_source(choose(pool, ALL, cap=40))
    assert (capped["reference-pool"] == 10).all() and (capped["round:2"] == 20).all()
    assert not choose(pool, ALL)["response_id"].duplicated().any()


QUARTERS = (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("shares", "cap", "counts", "expected"),
    [
        ((0.1, 0.7, 0.0, 0.2), 4, (64, 64, 64), (1, 1, 2)),
        ((0.1, 0.7, 0.0, 0.2), 5, (64, 64, 64), (1, 1, 3)),
        ((0.05, 0.95, 0.0, 0.0), None, (8, 0, 8), (1, 0, 8)),
        ((0.9, 0.1, 0.0, 0.0), None, (4, 0, 4), (4, 0, 1)),
        ((0.5, 0.5, 0.0, 0.0), 3, (64, 0, 64), (2, 0, 1)),
        (QUARTERS, 6, (64, 64, 64), (2, 1, 3)),
        (QUARTERS, 2, (8, 8, 8), (1, 0, 1)),
        (QUARTERS, 1, (8, 8, 8), (1, 0, 0)),
    ],
)
def test_whole_numbers_keep_to_the_cap_and_leave_no_source_out_that_has_room(
    shares, cap, counts, expected
):
    """π_ref's share never falls to 0 and no prompt loses all of its responses; counts of π_ref,
    earlier and the last round."""
    sources = ("reference-pool", "round:0", "round:1")
    pool = pool_of({source: n for source, n in zip(sources, counts, strict=True) if n})
    kinds = ("reference", "recent", "hard", "earlier")
    chosen = choose(pool, dict(zip(kinds, shares, strict=True)), cap=cap)
    by_prompt = by_source(chosen).reindex(columns=list(sources), fill_value=0)
    assert len(by_prompt) == 5
    assert [set(by_prompt[source]) for source in sources] == [{n} for n in expected]


def test_a_source_that_is_missing_leaves_its_share_to_the_others():
    first = pool_of({"reference-pool": 12})
    assert len(choose(first, ALL)) == 5 * 12
    second = pool_of({"reference-pool": 12, "round:0": 12})  # nothing is earlier
    counts = by_source(choose(second, ALL))
    assert (counts["reference-pool"] == 6).all() and (counts["round:0"] == 12).all()
    # Two of seven prompts are not dual prompts.
    mixed = [pool_of({"reference-pool": 12}, prompts=7), pool_of({"round:0": 12}, prompts=5)]
    counts = by_source(choose(pd.concat(mixed, ignore_index=True), ALL))
    assert sorted(counts["reference-pool"]) == [6] * 5 + [12] * 2


def test_draws_depend_on_ids_and_not_on_the_order_of_rows():
    pool = pool_of({"reference-pool": 40, "round:0": 30, "round:1": 64})
    ids = lambda chosen: set(chosen["response_id"])
    assert ids(choose(pool, ALL)) == ids(choose(pool.sample(frac=1, random_state=1), ALL))
    assert ids(choose(pool, ALL)) != ids(choose(pool, ALL, seed=1))
    assert choose(pool, ALL).index.is_monotonic_increasing


def test_hard_cases_are_drawn_with_odds_of_their_residual():
    """The first of a draw without replacement has probability |residual| / Σ|residual|, over many
    prompts with the same scores."""
    one, draws = pool_of({"reference-pool": 6, "round:0": 6}, prompts=1), 2000
    last = one[one["source"] == "round:0"]
    residual = last["r"] + 0.7 * last["g"] - 0.5 * (last["policy_logp"] - last["ref_logp"])
    odds = (residual - residual.mean()).abs()
    number = np.repeat(np.arange(draws), len(one)).astype(str)
    pool = pd.concat([one] * draws, ignore_index=True)
    kinds = pool["response_id"]
    pool = pool.assign(prompt_id="p" + number, response_id=kinds + "/" + number)
    shares = {"reference": 0.5, "recent": 0.0, "hard": 0.5, "earlier": 0.0}
    chosen = choose(pool, shares, cap=2)
    counts = kinds[chosen.index[chosen["source"] == "round:0"]].value_counts()
    assert counts.sum() == draws
    expected = (odds / odds.sum()).to_numpy()
    observed = counts.reindex(last["response_id"], fill_value=0).to_numpy() / draws
    error = np.abs(observed - expected) / np.sqrt(expected * (1 - expected) / draws)
    assert error.max() < 4 and expected.max() > 2 * expected.min()


def test_a_member_that_is_right_at_its_own_multipliers_is_not_hard():
    """Two trials of members at other λ and κ: no response of the exact one is hard, whatever its g;
    of the other one a response is wrong by 0.3 nats, half of the residual about its mean."""
    pool = pool_of({"reference-pool": 4, "trial:0.0.0": 5, "trial:0.0.1": 5}, prompts=40)
    own = {"trial:0.0.0": (0.2, 1.0), "trial:0.0.1": (2.1, 0.5)}
    tried = pool["source"].isin(own)
    lambda_, kappa = (
        pool["source"].map(lambda s, i=i: own.get(s, (np.nan,) * 2)[i]) for i in (0, 1)
    )
    score = (pool["r"] + lambda_ * pool["g"]) * kappa / 0.5
    level = score.groupby([pool["prompt_id"], pool["source"]]).transform("mean")
    exact = (pool["ref_logp"] + score - level).where(tried, pool["policy_logp"])
    pool = pool.assign(policy_logp=exact, **{"lambda/g": lambda_, "kappa": kappa})
    wrong = pool[tried].groupby("prompt_id").tail(1).index
    pool.loc[wrong, "policy_logp"] += 0.3
    shares = {"reference": 0.5, "recent": 0.0, "hard": 0.5, "earlier": 0.0}
    chosen = choose(pool, shares, cap=2)
    hard = chosen[chosen["source"] != "reference-pool"]
    assert len(hard) == 40 and set(hard["source"]) == {"trial:0.0.1"}
    assert 8 <= hard.index.isin(wrong).sum() <= 32


def test_shares_are_validated_together():
    with pytest.raises(UserError, match="must sum to 1"):
        load_recipe(QUICKSTART, ["pool.shares={reference: 0.5, recent: 0.6}"])
    with pytest.raises(UserError, match="reference"):
        load_recipe(QUICKSTART, ["pool.shares={reference: 0, recent: 1}"])
    fixed = ["pool.grow=false", "pool.shares={reference: 0.5, recent: 0.5}"]
    with pytest.raises(UserError, match=r"pool\.grow: false adds no responses"):
        load_recipe(QUICKSTART, fixed)
