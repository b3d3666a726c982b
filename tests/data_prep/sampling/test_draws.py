"""The sums that test draws: their law by enumeration of a tiny model's responses, and by seeded
simulation."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from constrained_dpo.estimates.draws import draw_test
from data_prep.sampling.draws import DrawLaw, draw_terms
from data_prep.sampling.logprobs import sampled_logps
from data_prep.tables import DRAWS
from tests.helpers.families import CONFIGS, VOCABULARY, model_of

PROMPT, ENDS = [5, 9, 3], (2, 7)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_over_all_responses_the_sums_have_mean_0_and_the_stated_variance(temperature, top_p):
    """All responses of at most two tokens, some of which end after one."""
    model = model_of(CONFIGS["llama"])
    others = [token for token in range(VOCABULARY) if token not in ENDS]
    responses = [[end] for end in ENDS]
    responses += [list(pair) for pair in product(others, range(VOCABULARY))]
    law = DrawLaw(temperature, top_p, ENDS)
    prompts = [PROMPT] * len(responses)
    logps = sampled_logps(model, prompts, responses, pad_id=0, batch_size=4096, law=law)
    weights, sums = np.exp(logps.sample), logps.draws
    assert abs(weights.sum() - 1) < 1e-5
    for name in ("surprisal", "eos"):
        excess, variance = sums[f"{name}_excess"], sums[f"{name}_variance"]
        assert abs(weights @ excess) < 1e-5 < 1e-3 < weights @ variance
        np.testing.assert_allclose(weights @ excess**2, weights @ variance, rtol=1e-3)
    assert (weights @ sums["outside_tokens"]) == 0
    assert (sums["outside_tokens"].max() > 0) == (top_p < 1)


def chains(rng: np.random.Generator, rows: int, ends: float = 0.0) -> pd.DataFrame:
    """Responses drawn from random next-token laws of 20 tokens, which depend on the last token, at
    most 12 long; `ends`: added to EOS's logit where they are drawn, not where they are tested."""
    logits = np.random.default_rng(3).normal(size=(20, 20))
    shifted = logits.copy()
    shifted[:, 0] += ends
    drawn_from = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    law = torch.tensor(logits).log_softmax(-1)
    last, alive = rng.integers(1, 20, rows), np.ones(rows, bool)
    sums, lengths = np.zeros((rows, len(DRAWS))), np.zeros(rows, int)
    for _ in range(12):
        uniform = rng.random(rows)[:, None]
        token = (drawn_from[last].cumsum(1) < uniform).sum(1).clip(max=19)
        terms = draw_terms(law[last], torch.tensor(token), (0,)).numpy()
        sums[alive] += terms[alive]
        lengths += alive
        alive &= token != 0
        last = token
    table = pd.DataFrame(sums, columns=list(DRAWS))
    return table.assign(token_ids=[np.zeros(n, int) for n in lengths])


def test_z_is_standard_normal_where_the_draws_are_right():
    table = chains(np.random.default_rng(1), 400 * 150)
    tests = [draw_test(rows) for _, rows in table.groupby(np.arange(len(table)) // 150)]
    for name in ("surprisal", "eos"):
        z = [getattr(test, name) for test in tests]
        assert stats.kstest(z, "norm").pvalue > 0.01
        assert max(map(abs, z)) < 4.5


def test_few_tokens_are_no_evidence_though_z_is_large():
    """EOS with probability 1/1000 at each of 50 tokens, in 20,000 tables: one is an accident."""
    rng, p = np.random.default_rng(5), 1e-3
    law = torch.tensor([[np.log(p), np.log1p(-p)]])
    ends, goes_on = (draw_terms(law, torch.tensor([token]), (0,))[0] for token in (0, 1))
    tests = []
    for count in np.unique(rng.binomial(50, p, 20_000), return_counts=False):
        row = (count * ends + (50 - count) * goes_on).numpy()
        table = pd.DataFrame([row], columns=list(DRAWS)).assign(token_ids=[np.zeros(50, int)])
        tests.append(draw_test(table))
    assert max(test.eos for test in tests) > 8 and max(test.evidence for test in tests) < 4


def test_responses_that_end_more_often_by_a_third_are_seen():
    test = draw_test(chains(np.random.default_rng(2), 3000, ends=0.3))
    assert test.eos > 5 and test.evidence > 5
    assert draw_test(chains(np.random.default_rng(2), 3000)).evidence < 4


def test_a_table_whose_tokens_are_not_all_known_is_not_tested():
    table = chains(np.random.default_rng(2), 50)
    table.loc[3, "eos_excess"] = np.nan
    assert draw_test(table) is None
    assert draw_test(table.drop(columns=list(DRAWS))) is None
