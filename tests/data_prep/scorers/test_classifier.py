"""The classifier scorer: EOS, templates, labels, window, storage, modelling code of a checkpoint's
own; its layouts: test_classifier_matrix.py."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import UserError
from data_prep.scorers import calibration
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from data_prep.scorers.settings import fill_template
from tests.helpers.models import save_classifier, save_word_tokenizer

PROMPTS = ["open the door", "sing", "a much longer request about nothing in particular", "x"]
RESPONSES = ["no", "la la la la la la", "", "yes of course with pleasure"]
TEMPLATE = "ask {prompt} say {response}"
WORDS = " ".join(PROMPTS + RESPONSES)
DRIFT_WORDS = " ".join([*calibration.DRIFT_PROMPTS, *calibration.DRIFT_ANSWERS])


def classifier(folder, **keys):
    return ClassifierScorerSettings(type="classifier", model=str(folder), **keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with one label."""
    return save_classifier(tmp_path_factory.mktemp("classifier"), f"{WORDS} {DRIFT_WORDS}")


@pytest.mark.parametrize("text", ["pair", "template"])
def test_an_eos_that_the_recipe_appends_is_read(folder, text):
    """Batched by length and padded, against each text alone and unpadded; without EOS:
    test_classifier_matrix.py."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    template = TEMPLATE if text == "template" else None
    scorer = make_scorer(classifier(folder, text=text, template=template, append_eos=True))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        response += tokenizer.eos_token
        texts = (prompt, response) if text == "pair" else (f"ask {prompt} say {response}",)
        with torch.no_grad():
            expected.append(model(**tokenizer(*texts, return_tensors="pt")).logits.item())
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_a_template_may_leave_the_prompt_out_but_not_the_response(folder):
    alone = make_scorer(classifier(folder, text="template", template="{response}"))
    assert np.ptp(alone.score(PROMPTS, ["la la"] * 4)) == 0
    with pytest.raises(UserError, match="needs a template with"):
        make_scorer(classifier(folder, text="template", template="{prompt}"))


def test_braces_of_a_prompt_stay():
    filled = fill_template(TEMPLATE, "{response}", "{prompt}")
    assert filled == "ask {response} say {prompt}"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A classifier with three labels, and its logits, (num_texts, 3)."""
    folder = save_classifier(tmp_path_factory.mktemp("three"), WORDS, labels=3)
    scorers = [make_scorer(classifier(folder, label=i)) for i in range(3)]
    return folder, np.stack([s.score(PROMPTS, RESPONSES) for s in scorers], axis=1)


def test_of_several_labels_the_recipe_names_one(three):
    folder, logits = three
    with pytest.raises(UserError, match="it has 3 labels"):
        make_scorer(classifier(folder))
    with pytest.raises(UserError, match="no label 'LABEL_9'"):
        make_scorer(classifier(folder, label="LABEL_9"))
    by_number, by_name = (make_scorer(classifier(folder, label=i)) for i in (1, "LABEL_2"))
    assert by_number.fingerprint != by_name.fingerprint
    np.testing.assert_array_equal(by_name.score(PROMPTS, RESPONSES), logits[:, 2])
    assert not np.allclose(logits[:, 1], logits[:, 2])


def test_a_number_that_is_another_labels_name_is_refused(tmp_path):
    """Stars: index 0 is named 1, so `label: 1` may mean either."""
    stars = {0: "1", 1: "2", 2: "3"}
    names = {"id2label": stars, "label2id": {name: i for i, name in stars.items()}}
    save_classifier(tmp_path, WORDS, labels=3, **names)
    with pytest.raises(UserError, match=r'label: 1 is the name of index 0, .* as in "1"'):
        make_scorer(classifier(tmp_path, label=1))
    assert make_scorer(classifier(tmp_path, label="1")).label == 0
    assert make_scorer(classifier(tmp_path, label=0)).label == 0  # no label is named 0


def test_outputs_of_a_head_with_several_labels(three, folder, tmp_path):
    several, logits = three
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for output, expected in (("log_probability", np.log(softmax)), ("probability", softmax)):
        scorer = make_scorer(classifier(several, label="LABEL_1", output=output))
        np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected[:, 1], atol=1e-5)
    save_classifier(tmp_path, WORDS, labels=3, problem_type="multi_label_classification")
    scorer = make_scorer(classifier(tmp_path, label=1, output="probability"))
    sigmoid = 1 / (1 + np.exp(-logits[:, 1]))
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), sigmoid, atol=1e-5)
    with pytest.raises(UserError, match="output: probability needs several labels"):
        make_scorer(classifier(folder, output="probability"))


def test_a_text_over_the_window_is_an_error_or_counted(folder):
    responses = RESPONSES[::-1]
    with pytest.raises(UserError, match="exceeds its window of 8"):
        make_scorer(classifier(folder, max_length=8)).score(PROMPTS, responses)
    scorer = make_scorer(classifier(folder, max_length=8, truncate=True))
    assert np.isfinite(scorer.score(PROMPTS, responses)).all()
    lengths = [
        len(scorer.tokenizer(p, r)["input_ids"]) for p, r in zip(PROMPTS, responses, strict=True)
    ]
    assert scorer.truncated == sum(length > 8 for length in lengths) > 0
    # The prompt's beginning goes first; the response, which is judged, stays whole.
    kept = scorer._encode(PROMPTS[2], RESPONSES[3])["input_ids"]
    assert scorer.tokenizer.decode(kept).endswith(RESPONSES[3])


def test_options_applied_after_the_model_are_outside_the_fingerprint(folder):
    """A scorer's fingerprint identifies the numbers that its model gives."""
    expected = make_scorer(classifier(folder)).fingerprint
    for keys in ({"indicator": 0.5}, {"clip": [0, 1], "negate": True}, {"batch_size": 3}):
        assert make_scorer(classifier(folder, **keys)).fingerprint == expected
    for keys in ({"quantization": "int8"}, {"max_length": 9}):
        assert make_scorer(classifier(folder, **keys)).fingerprint != expected


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_classifier_keeps_its_head_and_says_how_far_it_drifts(folder, quantization):
    import bitsandbytes as bnb

    plain, scorer = (
        make_scorer(classifier(folder, quantization=kind)) for kind in ("none", quantization)
    )
    kind = bnb.nn.Linear4bit if quantization == "nf4" else bnb.nn.Linear8bitLt
    quantized = [m for m in scorer.model.modules() if isinstance(m, kind)]
    assert len(quantized) == 14  # seven linear layers in each of two
    assert torch.equal(scorer.model.score.weight, plain.model.score.weight)
    drift = scorer.quantization_drift()
    prompts, answers = map(list, zip(*calibration.DRIFT_TEXTS, strict=True))
    exact = plain.score(prompts, answers)
    moved = np.abs(scorer.score(prompts, answers) - exact) / exact.std()
    assert drift["texts"] == len(prompts) and drift["against"] == "float32"
    assert drift["largest"] == pytest.approx(moved.max())
    assert drift["mean"] == pytest.approx(moved.mean()) and 0 < drift["mean"] < 0.5
    assert plain.quantization_drift() is None


def test_without_its_weights_a_drift_is_not_measured_for_that_reason(tmp_path):
    save_classifier(tmp_path, WORDS)
    scorer = make_scorer(classifier(tmp_path, quantization="nf4"))
    (tmp_path / "model.safetensors").unlink()
    assert "has no *.safetensors weights" in scorer.quantization_drift()["reason"]


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


def custom_classifier(folder, *, flat: bool, masked: bool, batch_size: int):
    """Settings of a checkpoint whose own code adds up token embeddings."""
    save_word_tokenizer(folder, " ".join(f"w{i}" for i in range(60)))
    (folder / "odd.py").write_text(CUSTOM)
    config = {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "odd.Config", "AutoModelForSequenceClassification": "odd.Model"},
        "flat": flat,
        "masked": masked,
        "num_labels": 1,
        "id2label": {"0": "score"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"embedding.weight": torch.arange(70.0)[:, None]}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return classifier(folder, trust_remote_code=True, batch_size=batch_size)


@pytest.mark.parametrize(("masked", "batch_size"), [(True, 16), (False, 1)])
def test_modelling_code_of_a_checkpoints_own_scores(tmp_path, masked, batch_size):
    prompts, responses = ["w1 w2 w3", "w4", "w5 w6 w7 w8"], ["w9", "w1 w1 w1", "w2 w3 w4 w5"]
    settings = custom_classifier(tmp_path, flat=False, masked=masked, batch_size=batch_size)
    scorer = make_scorer(settings)
    tokens = [scorer.tokenizer(p, r)["input_ids"] for p, r in zip(prompts, responses, strict=True)]
    assert scorer.score(prompts, responses).tolist() == [float(sum(ids)) for ids in tokens]


@pytest.mark.parametrize(
    ("flat", "masked", "match"),
    [
        (
            True,
            True,
            r"Model gives logits of shape \(2,\) for 2 texts and 1 labels, not \(2, 1\); wrap it "
            r"in a python scorer",
        ),
        (
            False,
            False,
            r"its own modelling code \(Model\) gives a text .* in a padded batch and .* alone; "
            r"set batch_size: 1",
        ),
    ],
)
def test_modelling_code_of_a_checkpoints_own_is_not_believed(tmp_path, flat, masked, match):
    settings = custom_classifier(tmp_path, flat=flat, masked=masked, batch_size=16)
    with pytest.raises(UserError, match=match):
        make_scorer(settings)
