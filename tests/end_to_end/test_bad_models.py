"""Bad model folders and adapters, kind by kind, through the command line."""

import json
import shutil

import pandas as pd
import pytest

from data_prep.readers.tables import write_parquet
from tests.helpers.broken import cut


@pytest.fixture(scope="module")
def one_prompt(tmp_path_factory):
    """A table of one prompt."""
    path = tmp_path_factory.mktemp("prompt") / "p.parquet"
    row = {"prompt_id": ["a"], "prompt": ["kid open safe"], "split": "fit"}
    write_parquet(pd.DataFrame(row), path)
    return path


def sample(prompts, out, model) -> list:
    words = ["data", "sample", prompts, "-o", out]
    return [*words, "--model", model, "--dtype", "float32"]


def configured(**keys):
    """A change of config.json alone."""

    def change(folder) -> None:
        config = json.loads((folder / "config.json").read_text()) | keys
        (folder / "config.json").write_text(json.dumps(config))

    return change


MODELS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "truncated weights": (cut("model.safetensors"), "cannot be loaded"),
    "truncated tokenizer": (cut("tokenizer.json"), "cannot be loaded"),
    "truncated config": (cut("config.json"), "cannot be loaded"),
    "config of no known model": (
        lambda f: (f / "config.json").write_text('{"model_type": "zzz"}'),
        "cannot be loaded",
    ),
    "weights of another size": (configured(hidden_size=64), "cannot be loaded"),
    "fewer layers in the weights": (configured(num_hidden_layers=3), "not in the checkpoint"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_folder(kind, refused, base, one_prompt, tmp_path):
    breaking, match = MODELS[kind]
    model = shutil.copytree(base, tmp_path / "model")
    breaking(model)
    out = tmp_path / "out.parquet"
    refused(*sample(one_prompt, out, model), match=match)
    assert not out.exists()


CLASSIFIERS = {
    "no classification head": (lambda f: None, "newly initialised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "truncated weights": (cut("model.safetensors"), "cannot be loaded"),
    "not a folder": (shutil.rmtree, "cannot be loaded"),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifier_folder(kind, refused, base, answers, tmp_path):
    breaking, match = CLASSIFIERS[kind]
    model = shutil.copytree(base, tmp_path / "model")
    breaking(model)
    out, scorer = tmp_path / "out.parquet", f"{{type: classifier, model: {model}}}"
    refused("data", "score", answers, "-o", out, "--name", "n", "--scorer", scorer, match=match)
    assert not out.exists()


def test_an_adapter_of_another_base(refused, base, one_prompt, foreign_adapter, tmp_path):
    words = [*sample(one_prompt, tmp_path / "o.parquet", base), "--adapter"]
    refused(*words, foreign_adapter, match="another base")
    refused(*words, tmp_path / "none", match="adapter")
