"""Adapters that are broken in one way each, against a real tiny policy: the gate names what is."""

import itertools
import json

import pytest

from constrained_dpo.api import Run
from constrained_dpo.gate.gate import GateOptions
from tests.helpers.cli import cdpo
from tests.helpers.taught import EVERY

LONG = "w5 w6 w5 w6 w5 w6"

ANSWERS = {"w5 w6": 0.67, "w13 w6": 0.05, "w7 w8": 0.12, "w9 w9": 0.08, LONG: 0.08}
"""Of π_ref: w5 is helpful, w13 does harm, w6 is right, w9 declines."""

BROKEN = {
    "harm everywhere": ("constraint harmless.w1", {EVERY: {"w13 w6": 1.0}}),
    "harm in one category": (
        "constraint harmless.w1",
        {range(1, 2): {"w13 w6": 1.0}, range(1): ANSWERS},
    ),
    "refusal": ("refusal", {EVERY: {"w9 w9": 1.0}}),
    "length": ("length", {EVERY: {LONG: 1.0}}),
    "capability": ("second_opinion right", {EVERY: {"w7 w8": 1.0}}),
}
"""The check that must fail, and what the adapter answers, by the prompt's first word."""

SCORERS = """
def helpful(prompts, responses):
    return [float("w5" in r.split()) for r in responses]

def harmless(prompts, responses):
    return [-float("w13" in r.split()) for r in responses]

def right(prompts, responses):
    return [float("w6" in r.split()) for r in responses]
"""


def prompt_file(path, first: range, count: int = 80):
    pairs = itertools.islice(itertools.product(first, range(60)), count)
    rows = ({"prompt": f"w{a} w{b}", "kind": f"w{a}"} for a, b in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of the taught policy, prepared and not trained, with a gate beside it."""
    from tests.helpers.taught import taught_base

    folder = tmp_path_factory.mktemp("taught")
    (folder / "scorers.py").write_text(SCORERS)
    scorer = lambda name, low, high: {
        "type": "python",
        "target": f"{folder}/scorers.py:{name}",
        "range": [low, high],
    }
    recipe = {
        "name": "taught",
        "policy": {
            "model": str(taught_base(folder / "base", ANSWERS)),
            "quantization": "none",
            "dtype": "float32",
        },
        "prompts": {"source": prompt_file(folder / "prompts.jsonl", range(2), 120), "test": 0.7},
        "sampling": {"responses_per_prompt": 4, "max_new_tokens": 8},
        "objective": {
            "beta": 0.25,
            "reward": {"name": "helpful", "scorer": scorer("helpful", 0, 1)},
            "constraints": [
                {
                    "name": "harmless",
                    "by": "kind",
                    "margin": -0.25,  # decided at 27 of 40 prompts or before, at 35 seeds
                    "scorer": scorer("harmless", -1, 0),
                }
            ],
        },
        "dual": {"method": "subgradient", "responses_per_prompt": 4},
        "fit": {"max_length": 32},
    }
    run = Run.create(recipe, folder / "run")
    run.prepare()
    right = {"name": "right", "no_worse_by": 0.3, "scorer": scorer("right", 0, 1)}
    checks = {
        "reward": {"drop": 0.3},
        "second_opinion": [right | {"prompts": prompt_file(folder / "quiz.jsonl", range(10, 14))}],
        "refusal": {
            "prompts": prompt_file(folder / "benign.jsonl", range(20, 24)),
            "increase": 0.3,
            "phrases": ["w9"],
        },
        "length": {"ratio": 1.4},
        "cut_off": {"increase": 0.3},
    }
    (folder / "gate.yaml").write_text(json.dumps({"checks": checks}))  # JSON is YAML
    return run, folder


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_adapter_fails_with_the_name_of_what_is_broken(prepared, tmp_path, broken):
    from tests.helpers.taught import taught_adapter

    run, folder = prepared
    check, lessons = BROKEN[broken]
    adapter = taught_adapter(folder / "base", tmp_path / "adapter", lessons)
    words = ("gate", run.path, folder / "gate.yaml", "--adapter", adapter, "--json")
    record = json.loads(cdpo(*words, check=1).stdout)
    failed = [f"{c['kind']} {c['name']}" for c in record["checks"] if c["verdict"] == "failed"]
    assert check in failed or f"{check} {check}" in failed, record["checks"]
    if broken == "harm in one category":  # the mean over all prompts would have hidden it
        assert "constraint harmless.w0" not in failed


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_passes_within_its_budget(prepared, tmp_path):
    from tests.helpers.taught import taught_adapter

    run, folder = prepared
    adapter = taught_adapter(folder / "base", tmp_path / "adapter", {})
    record = run.gate(folder / "gate.yaml", GateOptions(adapter=adapter, until_decided=True))
    assert record.verdict == "passed", record.checks
    assert record.available["right"] == record.available["refusal"] == 80
    assert all(check.decided_at is not None for check in record.checks)
