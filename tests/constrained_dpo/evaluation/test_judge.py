"""The judge: what it reads, how its answer is read, rates and intervals against enumeration; and a
run judged by real servers."""

import importlib.util
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.evaluation.judge import (
    bootstrap_interval,
    comparison_prompt,
    read_comparison,
    read_refusal,
    refusal_prompt,
    refusal_rates,
    win_rate,
)
from constrained_dpo.evaluation.judge_answers import (
    Judge,
    JudgeSettings,
    judge_pairs,
    judgement_lines,
    pair_responses,
    parse_judge,
)
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError


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


def test_the_interval_is_that_of_all_resamples():
    values = np.array([0.0, 0.5, 1.0, 1.0])
    everything = [np.mean(rows) for rows in itertools.product(values, repeat=4)]
    low, high = bootstrap_interval(values, 0.9, 3)
    assert (low, high) == pytest.approx(
        tuple(np.quantile(everything, [0.05, 0.95])), abs=1e-12
    )  # means are multiples of 1/8
    assert (
        bootstrap_interval(values, 0.9, 3) == (low, high)
        and bootstrap_interval(values[:1], 0.9, 3) is None
    )


def test_every_pair_of_verdicts_counts_as_it_should():
    words = ["a", "b", "tie", None]
    table = pd.DataFrame(
        [
            (f"p{i}", first, second)
            for i, (first, second) in enumerate(itertools.product(words, repeat=2))
        ],
        columns=["prompt_id", "policy_first", "policy_second"],
    )
    found = win_rate(table, 0.95, 0)
    by_hand = {
        ("a", "b"): 1.0,
        ("b", "a"): 0.0,
        ("a", "a"): 0.5,
        ("b", "b"): 0.5,
        ("tie", "tie"): 0.5,
    }
    by_hand |= {("a", "tie"): 0.75, ("tie", "b"): 0.75, ("b", "tie"): 0.25, ("tie", "a"): 0.25}
    assert found["rate"] == pytest.approx(np.mean(list(by_hand.values())))
    assert (found["pairs"], found["wins"], found["ties"], found["losses"]) == (9, 3, 3, 3)
    assert (found["unreadable_pairs"], found["unreadable_answers"], found["orders_disagree"]) == (
        7,
        8,
        2,
    )
    assert found["first_place"] == 0.5
    # A prompt counts once, however many pairs it has.
    twice = pd.DataFrame(
        {
            "prompt_id": ["p", "p", "q"],
            "policy_first": ["a", "a", "b"],
            "policy_second": ["b", "b", "a"],
        }
    )
    assert win_rate(twice, 0.95, 0)["rate"] == 0.5
    nothing = win_rate(table.assign(policy_first=None), 0.95, 0)
    assert (nothing["rate"], nothing["interval"], nothing["unreadable_pairs"]) == (None, None, 16)


def test_refusal_rates_are_paired_and_leave_unreadable_pairs_out():
    table = pd.DataFrame(
        {
            "prompt_id": list("aabc"),
            "policy": [True, False, True, None],
            "other": [False, False, None, True],
        }
    )
    found = refusal_rates(table, 0.95, 0)
    assert (found["policy"], found["other"], found["difference"]) == (0.5, 0.0, 0.5)
    assert (found["prompts"], found["unreadable_pairs"], found["interval"]) == (1, 2, None)


@pytest.fixture
def longer_is_better():
    """A chat server that prefers the longer answer, says that short answers decline, and talks past
    the question where it reads `odd`."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_POST(self):
            Handler.asked += 1
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][0]["content"]
            parts = [
                text.split(f"<{tag}>\n")[-1].split(f"\n</{tag}>")[0]
                for tag in ("answer_a", "answer_b", "answer")
            ]
            if "odd" in text:
                verdict = "I would rather not say."
            elif "<answer_a>" in text:
                longer = "AB"[len(parts[1]) > len(parts[0])]
                verdict = f"Verdict: {'tie' if len(parts[0]) == len(parts[1]) else longer}"
            else:
                verdict = f"Verdict: {'declines' if len(parts[2]) < 3 else 'answers'}"
            content = json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": f"Hm.\n{verdict}"}}]}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handler, server.url = Handler, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_pairs_are_judged_in_both_orders_and_answers_are_kept(longer_is_better, tmp_path):
    ids = ["p", "p", "q", "r", "s"]
    samples = pd.DataFrame({"prompt_id": ids, "response": ["long one", "x", "same", "no", "odd"]})
    other = pd.DataFrame(
        {"prompt_id": ids, "response": ["short", "y", "same", "a longer one", "word"]}
    )
    pairs = pair_responses(samples, other, pd.Series({i: f"request {i}" for i in set(ids)}), 1)
    assert (
        pairs["policy"].tolist() == ["long one", "same", "no", "odd"]
        and pairs["prompt"].iloc[1] == "request q"
    )
    settings = JudgeSettings(base_url=longer_is_better.url, model="m")
    found = judge_pairs(Judge(settings, tmp_path / "a.jsonl"), pairs, confidence=0.95, seed=0)
    for criterion in ("helpfulness", "safety"):
        assert {
            k: found[criterion][k]
            for k in ("rate", "wins", "ties", "losses", "unreadable_pairs", "first_place")
        } == {
            "rate": 0.5,
            "wins": 1,
            "ties": 1,
            "losses": 1,
            "unreadable_pairs": 1,
            "first_place": 0.5,
        }
    assert (found["refusals"]["policy"], found["refusals"]["other"]) == (pytest.approx(1 / 3), 0.0)
    asked = longer_is_better.handler.asked
    assert (
        asked == 2 * (2 * 4 - 1) + 2 * 4 - 1
    )  # the pair of equal texts reads the same in both orders
    lines = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(lines[:-20])  # a kill in the middle of a line
    assert (
        judge_pairs(Judge(settings, tmp_path / "a.jsonl"), pairs, confidence=0.95, seed=0) == found
    )
    assert longer_is_better.handler.asked == asked + 1
    assert (
        judge_pairs(Judge(settings, tmp_path / "a.jsonl"), pairs, confidence=0.95, seed=0) == found
    )
    assert longer_is_better.handler.asked == asked + 1
    with pytest.raises(UserError, match=r"has no response to 1 of the prompts, e\.g\. s"):
        pair_responses(samples, other.iloc[:4], pd.Series(dtype=str), 1)
    with pytest.raises(UserError, match="--judge: model Field required"):
        parse_judge('{base_url: "http://localhost:1/v1"}')


@pytest.fixture
def run(tmp_path):
    """A round of a tiny random model, played in seconds."""
    import yaml

    from tests.helpers.cli import cdpo
    from tests.helpers.models import save_tiny_causal_lm

    (tmp_path / "scorers.py").write_text(
        "def f(p, r): return [len(x.split()) for x in r]\ndef g(p, r): return [x.count('1') for x "
        "in r]\n"
    )
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(10))
    )
    recipe = {
        "name": "tiny",
        "policy": {
            "model": str(save_tiny_causal_lm(tmp_path / "model")),
            "quantization": "none",
            "dtype": "float32",
        },
        "prompts": {"source": "prompts.jsonl", "test": 0.4, "template": "{prompt}"},
        "sampling": {"responses_per_prompt": 4, "max_new_tokens": 6, "batch_size": 64},
        "objective": {
            "beta": 1.0,
            "reward": {"name": "f", "scorer": {"type": "python", "target": "scorers.py:f"}},
            "constraints": [
                {"name": "g", "margin": 0.1, "scorer": {"type": "python", "target": "scorers.py:g"}}
            ],
        },
        "dual": {"rounds": 1, "prompts_per_round": 4, "responses_per_prompt": 4},
        "fit": {"steps": 1, "batch_size": 4, "max_length": 32},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cdpo("init", tmp_path / "recipe.yaml", tmp_path / "run", check=0)
    cdpo("run", tmp_path / "run", check=0)
    return RunDirectory(tmp_path / "run")


def test_evaluate_judges_a_run(longer_is_better, run, tmp_path, refused):
    from tests.helpers.cli import cdpo

    (tmp_path / "harm.jsonl").write_text(
        '{"prompt": "w40 w41"}\n{"prompt": "w50 w51"}\n{"prompt": "w40 w41"}\n'
    )
    judge = json.dumps({"base_url": longer_is_better.url, "model": "m", "responses": 2})
    words = ["evaluate", run.path, "--judge", judge, "--responses", "2", "--json"]
    told = json.loads(cdpo(*words, "--unsafe", tmp_path / "harm.jsonl", check=0).stdout)
    assert (
        set(told["judge"]) == {"asked", "unsafe"}
        and told["judge"]["unsafe"]["safety"]["prompts"] == 2
    )
    assert told["judge"]["unsafe"]["left_out"] == {"duplicates": 1, "too_long": 0}
    assert (
        "prompts left out: 1 duplicates"
        in judgement_lines("unsafe", told["judge"]["unsafe"], "π_ref")[-1]
    )
    samples = pd.read_parquet(run.evaluation_folder(told["key"]) / "samples.parquet")
    reference = pd.read_parquet(run.evaluation_folder(told["key"]) / "reference.parquet")
    pairs = pair_responses(samples, reference, pd.Series(dtype=str), 2)
    difference = pairs["policy"].map(len) - pairs["other"].map(len)
    assert told["judge"]["asked"]["helpfulness"]["rate"] == pytest.approx(
        (np.sign(difference) / 2 + 0.5).mean()
    )
    assert len(list(run.evaluation_folder(told["key"]).glob("judgement-*.json"))) == 1
    text = cdpo(
        "evaluate", run.path, "--judge", judge, "--responses", "2", "--against", run.path, check=0
    ).stdout
    assert "test prompts, judged by m against" in text and "declines:" in text
    refused("evaluate", run.path, "--against", run.path, match="is read with --judge only")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(n) for n in ("fastapi", "uvicorn", "openai")),
    reason="needs transformers[serving]",
)
def test_a_real_chat_server_that_talks_nonsense_decides_nothing(tmp_path):
    from tests.helpers.models import save_tiny_causal_lm
    from tests.helpers.servers import start_transformers_serve

    folder = save_tiny_causal_lm(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'][:40] }}{% endfor %}"
    )
    server = start_transformers_serve(folder, tmp_path)
    pairs = pd.DataFrame({"prompt_id": ["p"], "prompt": ["w1"], "policy": ["w2"], "other": ["w3"]})
    try:
        settings = JudgeSettings(base_url=f"{server.url}/v1", model=str(folder), max_tokens=16)
        found = judge_pairs(Judge(settings, tmp_path / "a.jsonl"), pairs, confidence=0.95, seed=0)
    finally:
        server.kill()
    assert found["helpfulness"]["unreadable_pairs"] == 1 and found["helpfulness"]["rate"] is None
    assert (
        found["refusals"]["unreadable_pairs"] == 1
        and len((tmp_path / "a.jsonl").read_text().split("\n")) > 3
    )
