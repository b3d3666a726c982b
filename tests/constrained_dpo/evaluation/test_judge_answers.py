"""The judge's requests and what is kept of its answers; a run judged by a server."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import yaml

from constrained_dpo.evaluation.judge_answers import (
    Judge,
    JudgeSettings,
    judge_pairs,
    pair_responses,
    parse_judge,
)
from constrained_dpo.report.judge_words import judgement_lines
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.models import save_tiny_causal_lm
from tests.helpers.servers import start_transformers_serve


@pytest.fixture(scope="module")
def longer_is_better():
    """A chat server that prefers the longer answer, says that short answers decline, and talks past
    the question where it reads `odd`."""

    class Handler(BaseHTTPRequestHandler):
        requests = 0

        def do_POST(self):
            Handler.requests += 1
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


@pytest.fixture(scope="module")
def pairs() -> pd.DataFrame:
    """A win, a tie, a loss, and a pair that the judge will not decide; of a prompt's two responses
    the first counts."""
    ids = ["p", "p", "q", "r", "s"]
    policy = pd.DataFrame({"prompt_id": ids, "response": ["long one", "x", "same", "no", "odd"]})
    words = ["short", "y", "same", "a longer one", "word"]
    other = pd.DataFrame({"prompt_id": ids, "response": words})
    prompts = pd.Series({name: f"request {name}" for name in set(ids)})
    return pair_responses(policy, other, prompts, 1)


@pytest.fixture(scope="module")
def judged(longer_is_better, pairs, tmp_path_factory):
    """The verdicts on the pairs, the requests it took, and how they are asked for again."""
    file = tmp_path_factory.mktemp("judged") / "answers.jsonl"
    settings = JudgeSettings(base_url=longer_is_better.url, model="m")
    again = lambda: judge_pairs(Judge(settings, file), pairs, confidence=0.95)
    before = longer_is_better.handler.requests
    verdicts = again()
    return verdicts, longer_is_better.handler.requests - before, again, file


def test_responses_are_paired_by_prompt_and_number(pairs):
    assert pairs["policy"].tolist() == ["long one", "same", "no", "odd"]
    assert pairs["prompt"].iloc[1] == "request q"
    with pytest.raises(UserError, match=r"has no response to 1 of the prompts, e\.g\. s"):
        other = pairs[["prompt_id", "policy"]].rename(columns={"policy": "response"})
        pair_responses(other, other.iloc[:3], pd.Series(dtype=str), 1)


def test_pairs_are_judged_in_both_orders(judged):
    verdicts, requests, *_ = judged
    expected = {"rate": 0.5, "wins": 1, "ties": 1, "losses": 1, "unreadable_pairs": 1}
    for criterion in ("helpfulness", "safety"):
        rates = verdicts[criterion]
        assert {name: rates[name] for name in expected} == expected
        assert rates["first_place"] == 0.5
    refusals = verdicts["refusals"]
    assert (refusals["policy"], refusals["other"]) == (pytest.approx(1 / 3), 0.0)
    # The pair of equal texts reads the same in both orders.
    assert requests == 2 * (2 * 4 - 1) + 2 * 4 - 1


def test_answers_are_kept_and_asked_for_again_where_a_kill_cut_one_off(judged, longer_is_better):
    verdicts, _, again, file = judged
    before = longer_is_better.handler.requests
    file.write_text(file.read_text()[:-20])  # a kill in the middle of a line
    assert again() == verdicts and longer_is_better.handler.requests == before + 1
    assert again() == verdicts and longer_is_better.handler.requests == before + 1


def test_a_judge_without_a_model_is_refused():
    with pytest.raises(UserError, match="--judge: model Field required"):
        parse_judge('{base_url: "http://localhost:1/v1"}')


SCORERS = """
def f(prompts, responses):
    return [len(text.split()) for text in responses]


def g(prompts, responses):
    return [text.count("1") for text in responses]
"""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> RunDirectory:
    """A round of a tiny random model, played in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "scorers.py").write_text(SCORERS)
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    model = str(save_tiny_causal_lm(folder / "model"))
    scorer = lambda name: {"type": "python", "target": f"scorers.py:{name}"}
    recipe = {
        "name": "tiny",
        "policy": {"model": model, "quantization": "none", "dtype": "float32"},
        "prompts": {"source": "prompts.jsonl", "test": 0.4, "template": "{prompt}"},
        "sampling": {"responses_per_prompt": 4, "max_new_tokens": 6, "batch_size": 64},
        "objective": {
            "beta": 1.0,
            "reward": {"name": "f", "scorer": scorer("f")},
            "constraints": [{"name": "g", "margin": 0.1, "scorer": scorer("g")}],
        },
        "dual": {"rounds": 1, "prompts_per_round": 4, "responses_per_prompt": 4},
        "fit": {"steps": 1, "batch_size": 4, "max_length": 32},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cdpo("init", folder / "recipe.yaml", folder / "run", check=0)
    cdpo("run", folder / "run", check=0)
    return RunDirectory(folder / "run")


@pytest.fixture(scope="module")
def evaluated(longer_is_better, tiny_run, tmp_path_factory) -> dict:
    """The run judged on its test prompts and, apart, on prompts that ask for harm."""
    harm = tmp_path_factory.mktemp("harm") / "harm.jsonl"
    prompts = ["w40 w41", "w50 w51", "w40 w41"]
    harm.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = [*judge_words(tiny_run, longer_is_better), "--unsafe", harm, "--json"]
    return json.loads(cdpo(*words, check=0).stdout)


def judge_words(run, server) -> list:
    judge = json.dumps({"base_url": server.url, "model": "m", "responses": 2})
    return ["evaluate", run.path, "--judge", judge, "--responses", "2"]


def test_evaluate_judges_the_stored_responses_of_a_run(evaluated, tiny_run):
    folder = tiny_run.evaluation_folder(evaluated["key"])
    samples, reference = (
        read_parquet(folder / f"{name}.parquet") for name in ("samples", "reference")
    )
    pairs = pair_responses(samples, reference, pd.Series(dtype=str), 2)
    difference = pairs["policy"].map(len) - pairs["other"].map(len)
    rate = evaluated["judge"]["prompts"]["helpfulness"]["rate"]
    assert rate == pytest.approx((np.sign(difference) / 2 + 0.5).mean())
    assert len(list(folder.glob("judgement-*.json"))) == 1


def test_prompts_that_ask_for_harm_are_judged_apart(evaluated):
    unsafe = evaluated["judge"]["unsafe"]
    assert set(evaluated["judge"]) == {"prompts", "unsafe"}
    assert unsafe["safety"]["prompts"] == 2
    assert unsafe["left_out"] == {"duplicates": 1, "too_long": 0}
    lines = judgement_lines("unsafe", unsafe, "π_ref")
    assert "prompts left out: 1 duplicates" in lines[-1]


def test_a_run_is_compared_with_another(longer_is_better, tiny_run, refused):
    words = judge_words(tiny_run, longer_is_better)
    text = cdpo(*words, "--against", tiny_run.path, check=0).stdout
    assert "test prompts, judged by m against" in text and "declines:" in text
    against = ("--against", tiny_run.path)
    refused("evaluate", tiny_run.path, *against, match="is read with --judge only")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(n) for n in ("fastapi", "uvicorn", "openai")),
    reason="needs transformers[serving]",
)
def test_a_real_chat_server_that_talks_nonsense_decides_nothing(tmp_path):
    folder = save_tiny_causal_lm(tmp_path / "model")
    template = "{% for m in messages %}{{ m['content'][:40] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    server = start_transformers_serve(folder, tmp_path)
    pairs = pd.DataFrame({"prompt_id": ["p"], "prompt": ["w1"], "policy": ["w2"], "other": ["w3"]})
    file = tmp_path / "answers.jsonl"
    try:
        settings = JudgeSettings(base_url=f"{server.url}/v1", model=str(folder), max_tokens=16)
        verdicts = judge_pairs(Judge(settings, file), pairs, confidence=0.95)
    finally:
        server.kill()
    helpfulness = verdicts["helpfulness"]
    assert (helpfulness["unreadable_pairs"], helpfulness["rate"]) == (1, None)
    assert verdicts["refusals"]["unreadable_pairs"] == 1
    assert len(file.read_text().split("\n")) > 3
