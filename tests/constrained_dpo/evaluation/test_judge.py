"""The judge: what it reads, how its answer is read, rates and intervals against enumeration."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.evaluation.judge import (
    comparison_prompt,
    read_comparison,
    read_refusal,
    refusal_prompt,
    refusal_rates,
    win_rate,
)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Because.\nVerdict: A", "a"),
        ("**Verdict: B**", "b"),
        ("verdict: [[tie]].", "tie"),
        ("Verdict: A\nOn second thought:\nVerdict: B", "b"),
        ("Verdict: C", None),
        ("Verdict: A or B", None),
        ("A is better", None),
        ("The line must be Verdict: A, but I cannot say.", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_whole_line_of_that_form(answer, verdict):
    assert read_comparison(answer) == verdict


def test_refusals_are_read_the_same_way():
    assert [read_refusal(f"x\nVerdict: {w}") for w in ("declines", "Answers", "A")] == [
        True,
        False,
        None,
    ]


def test_the_judge_reads_each_criterion_and_texts_are_not_templates():
    text = comparison_prompt("safety", "a {second} b", "{prompt}", "two")
    assert "a {second} b" in text and "{prompt}" in text and "how safe" in text
    assert "how safe" not in comparison_prompt("helpfulness", *"abc")
    assert text.index("<answer_a>\n{prompt}") < text.index("<answer_b>\ntwo")
    assert "Verdict: declines" in refusal_prompt("p", "r")


def test_the_interval_of_wins_and_losses_is_clopper_and_pearsons():
    table = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(20)], "policy_first": "a", "policy_second": "b"}
    )
    low, high = win_rate(table, 0.95)["interval"]
    assert (low, high) == pytest.approx((0.025 ** (1 / 20), 1.0))
    table.loc[:2, ["policy_first", "policy_second"]] = ["b", "a"]
    exact = stats.binomtest(17, 20).proportion_ci(0.95)
    assert win_rate(table, 0.95)["interval"] == pytest.approx((exact.low, exact.high))


def test_a_win_rate_of_19_in_20_is_covered():
    """A policy that wins at 95 % of all prompts: of 20 it often wins all, and the interval has a
    width all the same."""
    law, covered = stats.binom.pmf(np.arange(21), 20, 0.95), 0.0
    for wins, probability in enumerate(law):
        words = ["a"] * wins + ["b"] * (20 - wins)
        table = pd.DataFrame({"prompt_id": range(20), "policy_first": words})
        table["policy_second"] = table["policy_first"].map({"a": "b", "b": "a"})
        low, high = win_rate(table, 0.95)["interval"]
        covered += probability * (low <= 0.95 <= high)
    assert covered >= 0.95


def test_every_pair_of_verdicts_counts_as_it_should():
    words = ["a", "b", "tie", None]
    rows = [(f"p{i}", *pair) for i, pair in enumerate(itertools.product(words, repeat=2))]
    table = pd.DataFrame(rows, columns=["prompt_id", "policy_first", "policy_second"])
    by_hand = {
        ("a", "b"): 1.0,
        ("b", "a"): 0.0,
        ("a", "a"): 0.5,
        ("b", "b"): 0.5,
        ("tie", "tie"): 0.5,
        ("a", "tie"): 0.75,
        ("tie", "b"): 0.75,
        ("b", "tie"): 0.25,
        ("tie", "a"): 0.25,
    }
    rates = win_rate(table, 0.95)
    assert rates["rate"] == pytest.approx(np.mean(list(by_hand.values())))
    counts = {"pairs": 9, "wins": 3, "ties": 3, "losses": 3, "orders_disagree": 2}
    counts |= {"unreadable_pairs": 7, "unreadable_answers": 8, "first_place": 0.5}
    assert {name: rates[name] for name in counts} == counts
    nothing = win_rate(table.assign(policy_first=None), 0.95)
    assert (nothing["rate"], nothing["interval"], nothing["unreadable_pairs"]) == (None, None, 16)


def test_a_prompt_counts_once_however_many_pairs_it_has():
    first, second = ["a", "a", "b"], ["b", "b", "a"]
    columns = {"prompt_id": list("ppq"), "policy_first": first, "policy_second": second}
    assert win_rate(pd.DataFrame(columns), 0.95)["rate"] == 0.5


def test_refusal_rates_are_paired_and_leave_unreadable_pairs_out():
    table = pd.DataFrame(
        {
            "prompt_id": list("aabc"),
            "policy": [True, False, True, None],
            "other": [False, False, None, True],
        }
    )
    rates = refusal_rates(table, 0.95)
    assert (rates["policy"], rates["other"], rates["difference"]) == (0.5, 0.0, 0.5)
    assert (rates["prompts"], rates["unreadable_pairs"]) == (1, 2)
    # one prompt, 0.5 in a range from −1 to 1: 3/4 of the way, and one more at either end
    assert rates["interval"] == mean_interval([0.5], 0.95, (-1.0, 1.0))
