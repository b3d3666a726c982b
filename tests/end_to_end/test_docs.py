"""The documentation's transcripts, executed: docs/guide/your-own-model.md as a newcomer types
it, docs/tutorial.md and docs/python-api.md block by block. Figures name what draws them."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.helpers.cli import cdpo
from tests.helpers.paths import REPO

OWN_MODEL = REPO / "docs" / "guide" / "your-own-model.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A small random Llama with a tokenizer of its own, saved as any user's folder is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(OWN_MODEL.read_text().splitlines(), trainer)
    folder = tmp_path_factory.mktemp("model") / "my-model"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def play_commands(body: str) -> list[str]:
    """Plays the lines of a console block; returns what each printed."""
    printed = []
    for line in body.splitlines():
        prompt, program, *arguments = shlex.split(line)
        assert (prompt, program) == ("$", "cdpo")
        printed.append(cdpo(*arguments, check=0).stdout)
    return printed


@pytest.mark.slow
def test_your_own_model_works_as_written(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "my-model").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    played = 0
    for kind, name, body in BLOCK.findall(OWN_MODEL.read_text()):
        if name:
            (tmp_path / name).write_text(body)
        elif kind == "console":
            played += len(play_commands(body))
    assert played == 10
    assert (tmp_path / "runs/mine/report/report.html").stat().st_size > 10_000
    assert (
        json.loads((tmp_path / "exported/merged/measurement.json").read_text())["num_prompts"] >= 2
    )
    mine, tighter = (
        json.loads((tmp_path / f"runs/{n}/state.json").read_text())["lambda"]
        for n in ("mine", "tighter")
    )
    assert len(mine) == 3 and len(tighter) == 2 and 0 < mine[0]["brief"] < tighter[0]["brief"]


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    printed, shown = "", 0
    for kind, _, body in BLOCK.findall((REPO / "docs" / "tutorial.md").read_text()):
        if kind == "console":
            printed = "".join(play_commands(body))
        elif kind == "python":
            exec(body, scope)
        else:  # its rows; the numbers are this machine's
            rows = {line.split()[0] for line in printed.splitlines() if line}
            assert {line.split()[0] for line in body.splitlines()} <= rows
            shown += len(body.splitlines())
    assert shown == 16
    assert scope["u"] == pytest.approx(scope["record"].test.u["harmless"], abs=1e-12)
    assert (tmp_path / "runs/tutorial/report/report.html").exists()
    assert (tmp_path / "exported/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_python_examples_play_a_whole_run(tmp_path, monkeypatch):
    from data_prep.models.policy import resolve_model
    from data_prep.models.settings import PolicySettings

    base = resolve_model(PolicySettings(model="quickstart"))
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for kind, _, body in BLOCK.findall((REPO / "docs" / "python-api.md").read_text()):
        if kind == "python":
            exec(body.replace('"BASE"', repr(base)), scope)
    run, following, solution = (scope[name] for name in ("run", "following", "solution"))
    assert len(run.directory.state().lambda_) == 3 and scope["played"].records[-1].round == 1
    assert scope["evaluated"].record.num_prompts == run.record().test.num_prompts
    assert scope["output"].shape[1] > 3
    assert scope["u"].loc["harmless", "u"] == pytest.approx(-0.1)
    assert following["harmless"] == pytest.approx(solution.lambda_["harmless"] + 0.1)
    assert len(scope["pairs"]) == 200 * 8


FIGURES = re.compile(r"(?:^!\[.*\]\(\S+\)\n)+\n?(.*)", re.MULTILINE)
DRAWN = re.compile(r"Drawn by `(make|python -m) (\S+)")


def test_every_figure_names_the_command_that_draws_it():
    pages = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("recipes/**/*.md")]
    captions = [caption for page in pages for caption in FIGURES.findall(page.read_text())]
    assert len(captions) >= 6
    targets = (REPO / "Makefile").read_text()
    for caption in captions:
        drawn = DRAWN.match(caption)
        assert drawn, caption
        program, name = drawn.groups()
        if program == "make":
            assert f"\n{name.strip('`.')}: " in targets, caption
        else:
            assert (REPO / f"{name.replace('.', '/')}.py").is_file(), caption


@pytest.mark.slow
def test_every_benchmark_imports():
    """They are played by hand, seldom: a name that moved would be found late."""
    names = sorted(f"benchmarks.{path.stem}" for path in (REPO / "benchmarks").glob("[a-z]*.py"))
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
