"""What reaches the terminal beside our own words: what users can act on."""

import json
import logging
import os
import re
import subprocess
import sys
import sysconfig

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from constrained_dpo.run.create import init_run
from data_prep.quickstart import build_policy
from data_prep.quiet import is_heard, of_library
from tests.helpers.cli import CDPO
from tests.helpers.paths import QUICKSTART, SMALL

# what the command says of its phases, of a round and of a scorer
OURS = re.compile(r"(prepare|round \d+)( done)?: .*")

SCORER = """
import asyncio, logging, time, warnings
import numpy as np

async def slow():
    time.sleep(0.2)

def score(prompts, responses):
    asyncio.run(slow(), debug=True)  # the library logs a warning
    np.mean([])  # the library warns
    warnings.warn("warned by my scorer")
    logging.getLogger("mine").warning("logged by my scorer")
    return [1.0 * len(r) for r in responses]
"""


def in_a_process(*words) -> subprocess.CompletedProcess:
    """The command as a user starts it, libraries not yet loaded."""
    environment = {n: v for n, v in os.environ.items() if not n.endswith("PROGRESS_BARS")}
    words = [*CDPO, *map(str, words)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)


def test_a_users_own_warnings_are_heard_and_those_of_libraries_are_not(answers, tmp_path):
    (tmp_path / "mine.py").write_text(SCORER)
    scorer = json.dumps({"type": "python", "target": f"{tmp_path}/mine.py:score"})
    score = ["data", "score", answers, "--name", "s", "--scorer", scorer]
    score += ["-o", tmp_path / "out.parquet"]
    quiet, verbose = (in_a_process(*front, *score) for front in ([], ["--verbose"]))
    assert quiet.returncode == verbose.returncode == 0, quiet.stderr + verbose.stderr
    for heard in ("UserWarning: warned by my scorer", "logged by my scorer"):
        assert heard in quiet.stderr and heard in verbose.stderr
    for theirs in ("Executing <Task", "Mean of empty slice"):
        assert theirs in verbose.stderr and theirs not in quiet.stderr


@pytest.mark.slow
def test_a_round_says_nothing_but_its_phases(tmp_path):
    """nf4, an adapter on a head that is tied: bitsandbytes, PEFT and transformers each warn."""
    base, few = tmp_path / "tied", ["prompts.max_fit=8", "prompts.max_test=4", "fit.steps=8"]
    model = AutoModelForCausalLM.from_pretrained(build_policy())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(build_policy()).save_pretrained(base)
    few += ["fit.warmup_steps=0", f"policy.model={base}", "policy.quantization=nf4"]
    run = init_run(
        QUICKSTART, tmp_path / "run", [*SMALL, *few, "policy.lora.target_modules=[q_proj,lm_head]"]
    )
    loud, quiet = (in_a_process(*front, "round", run.path) for front in (["--verbose"], []))
    assert loud.returncode == quiet.returncode == 0, loud.stderr + quiet.stderr
    for library in ("kernels-community", "tie_word_embeddings", "FutureWarning"):
        assert library in loud.stderr
    others = [line for line in quiet.stderr.splitlines() if not OURS.fullmatch(line)]
    assert others == [] and "round 1: fit: " in quiet.stderr


def test_what_a_library_is_is_a_matter_of_its_file(tmp_path):
    site = sysconfig.get_path("purelib")
    assert of_library(f"{site}/peft/peft_model.py") and of_library(pytest.__file__)
    assert of_library(logging.__file__) and of_library("<frozen importlib._bootstrap>")
    assert of_library(sys.modules["data_prep.quiet"].__file__)
    assert not of_library(str(tmp_path / "scorers.py")) and not of_library(__file__)


@pytest.mark.parametrize(
    ("name", "level", "heard"),
    [
        ("peft.tuners", logging.WARNING, False),
        ("peft.tuners", logging.ERROR, True),
        ("constrained_dpo.run", logging.INFO, True),
        ("data_prep.http", logging.WARNING, True),
    ],
)
def test_errors_of_libraries_and_our_own_words_are_heard(name, level, heard):
    file = f"{sysconfig.get_path('purelib')}/some/where.py"
    assert is_heard(logging.LogRecord(name, level, file, 1, "words", (), None)) == heard
