"""What a recipe can say of any scorer (negate, indicator, clip), a classifier's outputs and
storage, scores shared between runs."""

import json
import multiprocessing

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from constrained_dpo.check.scorers import checked_scorer, golden_lines
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import (
    describe_drift,
    prepared_lines,
    score_statistics,
    scorer_facts,
)
from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.models.checkpoints import fingerprint_model
from data_prep.scorers import calibration
from data_prep.scorers.beaver import GOLDEN_TEXT
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.scoring import apply_options, make_scorer, score_texts
from data_prep.scorers.settings import ClassifierScorerSettings, PythonScorerSettings, ScorerOptions
from tests.helpers.beaver import plain_score, save_beaver
from tests.helpers.cli import cdpo
from tests.helpers.models import save_word_tokenizer, tiny_llama_config
from tests.helpers.paths import QUICKSTART

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
RESPONSES = ["w9", "w1 w1 w1", "w2 w3 w4 w5"]


def save_classifier(folder, labels=1, **keys) -> None:
    """A random Llama classifier that knows the texts above and those of the drift check."""
    from transformers import LlamaForSequenceClassification

    size = save_word_tokenizer(
        folder,
        " ".join([*PROMPTS, *RESPONSES, *calibration.DRIFT_PROMPTS, *calibration.DRIFT_ANSWERS]),
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        tiny_llama_config(size, num_labels=labels, **keys)
    ).eval()
    torch.nn.init.normal_(model.score.weight, std=2.0)
    model.save_pretrained(folder)


def classifier(folder, **keys):
    return ClassifierScorerSettings(type="classifier", model=str(folder), **keys)


# Options of every scorer.


def test_options_apply_after_negation():
    scores = np.array([[-2.0, 0.0], [0.5, 3.0]])
    assert apply_options(scores, ScorerOptions()).tolist() == scores.tolist()
    assert apply_options(scores, ScorerOptions(negate=True)).tolist() == [[2, 0], [-0.5, -3]]
    assert apply_options(scores, ScorerOptions(indicator=0.0)).tolist() == [[0, 1], [1, 1]]
    assert apply_options(scores, ScorerOptions(negate=True, indicator=0.0)).tolist() == [
        [1, 1],
        [0, 0],
    ]
    assert apply_options(scores, ScorerOptions(negate=True, clip=[-1, 1])).tolist() == [
        [1, 0],
        [-0.5, -1],
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("{indicator: 0, clip: [0, 1]}", "harmless.scorer: indicator and clip: give one of them"),
        ("{clip: [1, 1]}", "clip is [1.0, 1.0]; write [low, high] with low < high"),
        ("{clip: [1]}", "clip: list should have at least 2 items"),
        ("{indicator: yes please}", "indicator: input should be a valid number"),
    ],
)
def test_options_that_contradict_themselves_name_their_key(options, match):
    block = options.replace("{", '{type: python, target: "data_prep.quickstart:harmless", ')
    with pytest.raises(UserError) as error:
        load_recipe(QUICKSTART, [f"objective.constraints.harmless.scorer={block}"])
    assert (
        match in str(error.value).replace("constraints.0", "harmless")
        and len(str(error.value).splitlines()) == 1
    )


def test_the_cache_keeps_raw_scores_so_that_options_cost_nothing(tmp_path):
    log = tmp_path / "calls"
    (tmp_path / "s.py").write_text(
        f"def f(p, r):\n    open({str(log)!r}, 'a').write('x' * len(r))\n    return [float(x) for "
        "x in r]\n"
    )
    scorer = make_scorer(PythonScorerSettings(type="python", target=f"{tmp_path / 's.py'}:f"))
    cache = ScoreCache(tmp_path / "scores.sqlite")

    def scored(**options):
        return score_texts(
            scorer,
            ["p"] * 3,
            ["-1", "0.5", "2"],
            options=ScorerOptions(**options),
            name="g",
            cache=cache,
        ).tolist()

    assert (
        scored(clip=[0, 1]) == [0, 0.5, 1]
        and scored(indicator=0.5) == [0, 1, 1]
        and scored(negate=True, indicator=0) == [1, 0, 0]
    )
    assert scored() == [-1, 0.5, 2] and log.read_text() == "xxx"


def test_a_column_scorer_takes_options_too(tmp_path):
    table = pd.DataFrame({"prompt": "p", "response": ["a", "b", "c"], "cost": [-3.0, 1.0, 0.0]})
    table.to_csv(tmp_path / "t.csv", index=False)
    scorer = (
        f"{{type: column, file: {tmp_path / 't.csv'}, column: cost, negate: true, indicator: 0}}"
    )
    cdpo(
        "data",
        "score",
        tmp_path / "t.csv",
        "--name",
        "safe",
        "--scorer",
        scorer,
        "-o",
        tmp_path / "o.parquet",
        check=0,
    )
    assert pd.read_parquet(tmp_path / "o.parquet")["safe"].tolist() == [1, 0, 1]


def test_statistics_count_what_a_clip_cut():
    table = pd.DataFrame({"r": [0.0, 1.0, 2.0, 3.0], "g": [0.0, 1.0, 1.0, 0.25]})
    found = score_statistics(table, {"r": ScorerOptions(), "g": ScorerOptions(clip=[0, 1])})
    assert (
        found["r"]["mean"] == 1.5
        and found["r"]["std"] == pytest.approx(np.sqrt(1.25))
        and found["r"]["q25"] == 0.75
    )
    assert found["g"]["clipped"] == 0.75 and "clipped" not in found["r"]


# The classifier.


def test_fingerprints_of_earlier_releases_hold(tmp_path):
    """A scorer's fingerprint identifies a prepared run's scores: new keys at their defaults, and
    options outside it, leave it as it was."""
    save_classifier(tmp_path)
    expected = (
        f"classifier:{fingerprint_model(str(tmp_path), None)}:0:"
        '{"type":"classifier","label":null,"text":"pair","template":null,"append_eos":false,"max_length":null,"truncate":false,'
        '"dtype":"float32","trust_remote_code":false}'
    )
    for keys in (
        {},
        {"indicator": 0.5},
        {"clip": [0, 1], "negate": True},
        {"quantization": "none", "output": "logit"},
    ):
        assert make_scorer(classifier(tmp_path, **keys)).fingerprint == expected
    assert make_scorer(classifier(tmp_path, quantization="int8")).fingerprint != expected


def test_outputs_of_a_head_with_several_labels(tmp_path):
    save_classifier(tmp_path, labels=3)
    logits = np.stack(
        [make_scorer(classifier(tmp_path, label=i)).score(PROMPTS, RESPONSES) for i in range(3)],
        axis=1,
    )
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for output, expected in (("log_probability", np.log(softmax)), ("probability", softmax)):
        found = make_scorer(classifier(tmp_path, label="LABEL_1", output=output)).score(
            PROMPTS, RESPONSES
        )
        np.testing.assert_allclose(found, expected[:, 1], atol=1e-5)
    save_classifier(tmp_path, labels=3, problem_type="multi_label_classification")
    found = make_scorer(classifier(tmp_path, label=1, output="probability")).score(
        PROMPTS, RESPONSES
    )
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits[:, 1])), atol=1e-5)
    save_classifier(tmp_path)
    with pytest.raises(UserError, match="output: probability needs several labels"):
        make_scorer(classifier(tmp_path, output="probability"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_classifier_keeps_its_head_and_says_how_far_it_drifts(tmp_path, quantization):
    import bitsandbytes as bnb

    save_classifier(tmp_path)
    plain, scorer = (
        make_scorer(classifier(tmp_path)),
        make_scorer(classifier(tmp_path, quantization=quantization)),
    )
    kind = bnb.nn.Linear4bit if quantization == "nf4" else bnb.nn.Linear8bitLt
    assert (
        sum(isinstance(m, kind) for m in scorer.model.modules()) == 14
    )  # seven linear layers in each of two
    assert torch.equal(scorer.model.score.weight, plain.model.score.weight)
    found = scorer.quantization_drift()
    fits = [text for text in calibration.DRIFT_TEXTS if plain.text_length(*text) <= 64]
    prompts, answers = zip(*fits, strict=True)
    exact = plain.score(list(prompts), list(answers))
    moved = np.abs(scorer.score(list(prompts), list(answers)) - exact) / exact.std()
    assert (
        found["texts"] == len(fits) == len(calibration.DRIFT_TEXTS)
        and found["against"] == "float32"
    )
    assert (
        found["largest"] == pytest.approx(moved.max())
        and found["mean"] == pytest.approx(moved.mean())
        and 0 < found["mean"] < 0.5
    )
    assert plain.quantization_drift() is None
    assert (
        f"scores move by {found['mean']:.2g} std on average, {found['largest']:.2g} std at most"
        in describe_drift("g", found)
    )
    (tmp_path / "model.safetensors").unlink()
    assert "has no *.safetensors weights" in describe_drift("g", scorer.quantization_drift())


def test_drift_is_in_what_check_and_prepare_know_of_a_scorer(tmp_path):
    save_classifier(tmp_path / "model")
    block = f"{{type: classifier, model: {tmp_path / 'model'}, quantization: nf4}}"
    recipe = load_recipe(QUICKSTART, [f"objective.reward.scorer={block}"])
    run = RunDirectory(tmp_path)
    learner = LoraLearner(recipe, run, pd.DataFrame())
    measured = learner.measured_scorers(pd.DataFrame())
    assert set(measured) == {"helpful"} and set(measured["helpful"]) == {"quantization_drift"}
    drift = measured["helpful"]["quantization_drift"]
    assert drift["mean"] > 0
    assert (
        checked_scorer("helpful", learner.scorers["helpful"], recipe.scorers["helpful"], recipe)[
            "quantization_drift"
        ]
        == drift
    )
    pool = pd.DataFrame({"helpful": [0.0, 1.0], "harmless": [1.0, 2.0]})
    write_json(run.scorers_file, scorer_facts(recipe, pool, measured))
    lines = prepared_lines(run, recipe)
    assert lines[0].startswith("scores of helpful: mean 0.5, std 0.5") and lines[
        2
    ] == describe_drift("helpful", drift)
    assert len(lines) == 3


CUSTOM = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class Config(PretrainedConfig):
    model_type = "odd"

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(70, 1)
        self.post_init()
    def get_input_embeddings(self):
        return self.embedding
    def forward(self, input_ids, attention_mask=None, **more):
        mask = attention_mask if self.config.masked else torch.ones_like(input_ids)
        score = (self.embedding(input_ids)[..., 0] * mask).sum(1)
        return SequenceClassifierOutput(logits=score if self.config.flat else score[:, None])
"""


@pytest.mark.parametrize(
    ("flat", "masked", "size", "match"),
    [
        (False, True, 16, None),
        (
            True,
            True,
            16,
            r"Model gives logits of shape \(2,\) for 2 texts and 1 labels, not \(2, 1\); wrap it "
            r"in a python scorer",
        ),
        (
            False,
            False,
            16,
            r"its own modelling code \(Model\) gives a text .* in a padded batch and .* alone; "
            r"set batch_size: 1",
        ),
        (False, False, 1, None),
    ],
)
def test_modelling_code_of_a_checkpoints_own_is_asked_before_it_is_believed(
    tmp_path, flat, masked, size, match
):
    save_word_tokenizer(tmp_path, " ".join(f"w{i}" for i in range(60)))
    (tmp_path / "odd.py").write_text(CUSTOM)
    names = {"AutoConfig": "odd.Config", "AutoModelForSequenceClassification": "odd.Model"}
    config = {
        "model_type": "odd",
        "auto_map": names,
        "flat": flat,
        "masked": masked,
        "num_labels": 1,
        "id2label": {"0": "score"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {"embedding.weight": torch.arange(70.0)[:, None]},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = classifier(tmp_path, trust_remote_code=True, batch_size=size)
    if match is not None:
        with pytest.raises(UserError, match=match):
            make_scorer(settings)
        return
    scorer = make_scorer(settings)
    words = [scorer.tokenizer(p, r)["input_ids"] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scorer.score(PROMPTS, RESPONSES).tolist() == [float(sum(ids)) for ids in words]


# Scores that are computed already.


def scores_of(scorer, cache):
    return score_texts(scorer, PROMPTS, RESPONSES, options=ScorerOptions(), name="g", cache=cache)


def test_a_score_is_computed_once_and_one_changed_weight_changes_all(tmp_path):
    save_classifier(tmp_path / "model")
    first = scores_of(
        make_scorer(classifier(tmp_path / "model")), ScoreCache(tmp_path / "a.sqlite")
    )
    unable = make_scorer(classifier(tmp_path / "model"))
    unable.model = None  # a score that is there needs no forward
    assert scores_of(unable, ScoreCache(tmp_path / "a.sqlite")).tolist() == first.tolist()
    with pytest.raises(AttributeError, match="NoneType"):
        scores_of(unable, ScoreCache(tmp_path / "b.sqlite"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1.0
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    changed = make_scorer(classifier(tmp_path / "model"))
    scores = scores_of(changed, ScoreCache(tmp_path / "a.sqlite"))
    assert (
        scores.tolist() == changed.score(PROMPTS, RESPONSES).tolist()
        and not np.isin(scores, first).any()
    )


def _fill(path, start):
    cache = ScoreCache(path)
    for i in range(start, start + 40):
        cache.put({i.to_bytes(4, "big"): float(i)})


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "scores.sqlite"
    processes = [
        multiprocessing.get_context("fork").Process(target=_fill, args=(path, start))
        for start in (0, 40)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    keys = [i.to_bytes(4, "big") for i in range(80)]
    assert ScoreCache(path).get(keys) == {key: float(i) for i, key in enumerate(keys)}


# Beaver's published value.


def test_the_golden_value_is_computed_where_the_model_is_and_else_said_how(tmp_path):
    folder = tmp_path / "beaver-7b-v1.0-reward"
    tensors = save_beaver(folder)
    block = f"{{type: beaver, model: {folder}, dtype: float32}}"
    recipe = load_recipe(QUICKSTART, [f"objective.reward.scorer={block}"])
    scorer = make_scorer(recipe.scorers["helpful"])
    prompt, response = GOLDEN_TEXT
    text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
    expected = plain_score(tensors, scorer.tokenizer(text)["input_ids"])
    assert scorer.golden_score() == pytest.approx(expected, abs=1e-5)
    (line,) = golden_lines(recipe, {"helpful": scorer})
    assert f"scores {expected:.4f}, published -11.3254" in line and "DIFFERS" in line
    (line,) = golden_lines(recipe, {})
    assert "cdpo data score golden.jsonl" in line and "append_eos: false" in line
    assert golden_lines(load_recipe(QUICKSTART), {}) == []
