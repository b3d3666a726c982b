"""lm-eval's results before and after."""

import json

import pytest

from constrained_dpo.gate.capability import read_capability
from constrained_dpo.gate.decide import judge_capability
from constrained_dpo.gate.settings import CapabilityCheck
from data_prep.errors import UserError


def results(value: object, stderr: object = 0.01, **more: object) -> dict:
    task = {"alias": "gsm8k", "acc,none": value, "acc_stderr,none": stderr}
    content = {
        "results": {"gsm8k": task},
        "versions": {"gsm8k": 3.0},
        "n-shot": {"gsm8k": 5},
        "n-samples": {"gsm8k": {"original": 1000, "effective": 1000}},
        "higher_is_better": {"gsm8k": {"acc": True}},
    }
    return content | more


def check(folder, before: dict, after: dict, metric: str = "acc,none") -> CapabilityCheck:
    for name, content in (("before", before), ("after", after)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    files = {name: str(folder / f"{name}.json") for name in ("before", "after")}
    return CapabilityCheck(task="gsm8k", metric=metric, drop=0.05, **files)


@pytest.mark.parametrize(
    ("after", "stderr", "verdict"),
    [(0.60, 0.01, "passed"), (0.55, 0.01, "undecided"), (0.40, 0.01, "failed"), (0, 0, "failed")],
)
def test_a_lost_capability_fails_and_a_kept_one_passes(tmp_path, after, stderr, verdict):
    """The last one lost it whole; its standard error of 0 is no certainty."""
    capability = read_capability(check(tmp_path, results(0.6), results(after, stderr)))
    assert judge_capability(capability, 0.05, 5).verdict == verdict


def test_where_lower_is_better_a_rise_is_the_loss(tmp_path):
    lower = {"higher_is_better": {"gsm8k": {"acc": False}}}
    capability = read_capability(check(tmp_path, results(0.3, **lower), results(0.5, **lower)))
    assert capability.room == pytest.approx(-0.15)
    assert capability.se == pytest.approx(0.01 * 2**0.5)


@pytest.mark.parametrize(
    ("before", "after", "metric", "match"),
    [
        (results(0.6), results(0.6, **{"n-shot": {"gsm8k": 0}}), "acc,none", "n-shot is 5"),
        (results(0.6), results(0.6, "N/A"), "acc,none", "no number acc_stderr,none"),
        (results(0.6), results(0.6), "exact_match,none", "its metrics are acc,none"),
        (results(0.6), results(0.6) | {"results": {}}, "acc,none", "no task gsm8k"),
        (results(0.6), {"result": 1}, "acc,none", "n-shot|versions|no key `results`"),
        (results(0.6, 0.0), results(0.6), "acc,none", "standard error of gsm8k/acc,none is 0"),
    ],
)
def test_what_is_missing_or_measured_otherwise_is_a_mistake(tmp_path, before, after, metric, match):
    with pytest.raises(UserError, match=match):
        read_capability(check(tmp_path, before, after, metric))
