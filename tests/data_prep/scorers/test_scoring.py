"""Scorers against independent computations; the cache; what a scorer may not return."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.errors import UserError
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.scoring import make_scorer, score_texts
from data_prep.scorers.settings import (
    ClassifierScorerSettings,
    ColumnScorerSettings,
    PythonScorerSettings,
    ScorerOptions,
    fill_template,
)
from tests.helpers.paths import REAL

PROMPTS = ["open the door", "sing", "a much longer request about nothing in particular", "x"]
RESPONSES = ["no", "la la la la la la", "", "yes of course with pleasure"]


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def classifier(request, tmp_path_factory):
    """A tiny random classifier with a word tokenizer, saved as users save theirs; gpt2 has no pad
    token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = {
        w: i
        for i, w in enumerate(["<unk>", "<eos>", "<sep>", *" ".join(PROMPTS + RESPONSES).split()])
    }
    vocabulary = {w: i for i, w in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A <sep> $B", special_tokens=[("<sep>", vocabulary["<sep>"])]
    )
    pad = {} if request.param == "gpt2" else {"pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **pad).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    size = {"vocab_size": len(vocabulary), "num_labels": 1}
    if request.param == "bert":
        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **size
        )
        model = BertForSequenceClassification(config)
    elif request.param == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **size)
        )
    else:
        model = LlamaForSequenceClassification(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                **size,
            )
        )
    model.eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", ["pair", "template"])
@pytest.mark.parametrize("append_eos", [False, True])
def test_classifier_equals_one_plain_forward_per_text(classifier, text, append_eos):
    """Batched by length and padded, against each text alone and unpadded."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    template = "ask {prompt} say {response}"
    scorer = make_scorer(
        ClassifierScorerSettings(
            type="classifier",
            model=str(classifier),
            text=text,
            template=template if text == "template" else None,
            append_eos=append_eos,
        )
    )
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(classifier).eval(),
        AutoTokenizer.from_pretrained(classifier),
    )
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        response += "<eos>" if append_eos else ""
        if text == "pair":
            encoded = tokenizer(prompt, response, return_tensors="pt")
        else:
            encoded = tokenizer(
                template.replace("{prompt}", prompt).replace("{response}", response),
                return_tensors="pt",
            )
        model.config.pad_token_id = None
        with torch.no_grad():
            expected.append(model(**encoded).logits[0, 0].item())
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_a_template_may_leave_the_prompt_out_and_braces_of_a_prompt_stay(classifier):
    base = {"type": "classifier", "model": str(classifier), "text": "template"}
    alone = make_scorer(ClassifierScorerSettings(**base, template="{response}"))
    assert np.ptp(alone.score(PROMPTS, ["la la"] * 4)) == 0
    assert (
        fill_template("ask {prompt} say {response}", "{response}", "{prompt}")
        == "ask {response} say {prompt}"
    )
    with pytest.raises(UserError, match="needs a template with"):
        make_scorer(ClassifierScorerSettings(**base, template="{prompt}"))


def test_classifier_refuses_a_new_head_and_ambiguous_labels(classifier, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    weights = load_file(classifier / "model.safetensors")
    heads = [n for n in weights if n.startswith(("classifier", "score"))]
    save_file(
        {n: w for n, w in weights.items() if n not in heads},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    AutoConfig.from_pretrained(classifier).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="newly initialised"):
        make_scorer(ClassifierScorerSettings(type="classifier", model=str(tmp_path)))
    AutoModelForSequenceClassification.from_pretrained(
        classifier, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it has 3 labels"):
        make_scorer(ClassifierScorerSettings(type="classifier", model=str(tmp_path)))
    one, two = (
        make_scorer(ClassifierScorerSettings(type="classifier", model=str(tmp_path), label=label))
        for label in (1, "LABEL_2")
    )
    assert one.fingerprint != two.fingerprint
    assert not np.allclose(one.score(PROMPTS, RESPONSES), two.score(PROMPTS, RESPONSES))
    with pytest.raises(UserError, match="no label 'LABEL_9'"):
        make_scorer(
            ClassifierScorerSettings(type="classifier", model=str(tmp_path), label="LABEL_9")
        )


def test_classifier_window_is_an_error_or_counted(classifier):
    base = {"type": "classifier", "model": str(classifier), "max_length": 8}
    with pytest.raises(UserError, match="exceeds its window of 8"):
        make_scorer(ClassifierScorerSettings(**base)).score(PROMPTS, RESPONSES[::-1])
    scorer = make_scorer(ClassifierScorerSettings(**base, truncate=True))
    assert np.isfinite(scorer.score(PROMPTS, RESPONSES[::-1])).all()
    long = [
        len(scorer.tokenizer(p, r)["input_ids"]) > 8
        for p, r in zip(PROMPTS, RESPONSES[::-1], strict=True)
    ]
    assert scorer.truncated == sum(long) > 0
    # The prompt's beginning goes first; the response, which is judged, stays whole.
    kept = scorer._encode(PROMPTS[2], RESPONSES[3])["input_ids"]
    assert scorer.tokenizer.decode(kept).endswith(RESPONSES[3])


def python_scorer(tmp_path, body: str):
    path = tmp_path / "scorer.py"
    path.write_text(f"def f(prompts, responses):\n    {body}\n")
    return make_scorer(PythonScorerSettings(type="python", target=f"{path}:f"))


def test_python_scorer_scores_and_its_cache_never_scores_twice(tmp_path):
    log = tmp_path / "calls"
    body = (
        f"open({str(log)!r}, 'a').write('x' * len(responses)); return [float(len(r)) for r in "
        "responses]"
    )
    scorer = python_scorer(tmp_path, body)
    cache = ScoreCache(tmp_path / "scores.sqlite")
    prompts, responses = ["a", "a", "b", "a"], ["one", "three", "one", "one"]
    first = score_texts(
        scorer, prompts, responses, options=ScorerOptions(), name="len", cache=cache
    )
    assert first.tolist() == [3, 5, 3, 3] and log.read_text() == "xxx"
    again = ScoreCache(tmp_path / "scores.sqlite")  # another process
    assert score_texts(
        scorer, prompts, responses, options=ScorerOptions(negate=True), name="len", cache=again
    ).tolist() == [-3, -5, -3, -3]
    assert log.read_text() == "xxx"
    changed = python_scorer(tmp_path, body.replace("len(r)", "len(r) + 1"))
    assert score_texts(
        changed, prompts, responses, options=ScorerOptions(), name="len", cache=again
    ).tolist() == [4, 6, 4, 4]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("return [1.0]", "returned shape"),
        ("return None", "returned shape"),
        ("return ['good'] * len(responses)", "did not return numbers"),
        ("raise ValueError('boom')", "raised ValueError: boom"),
        ("return [float('nan')] * len(responses)", "scores must be finite"),
    ],
)
def test_a_misbehaving_function_is_one_clear_error(tmp_path, body, match):
    scorer = python_scorer(tmp_path, body)
    with pytest.raises(UserError, match=match):
        score_texts(
            scorer,
            ["a", "b"],
            ["c", "d"],
            options=ScorerOptions(),
            name="g",
            cache=ScoreCache(None),
        )


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("nothing.py:f", "no such file"),
        ("math:nothing", "no function nothing"),
        ("nomodule.x:f", "cannot be imported"),
        ("math", "write"),
    ],
)
def test_targets_that_do_not_exist(target, match):
    with pytest.raises(UserError, match=match):
        make_scorer(PythonScorerSettings(type="python", target=target))


def test_column_scorer_looks_up_and_refuses_what_it_does_not_know(tmp_path):
    table = pd.DataFrame({"prompt": ["a", "b"], "response": ["x", "y"], "helpful": [0.5, -1.0]})
    table.to_csv(tmp_path / "scored.csv", index=False)
    scorer = make_scorer(
        ColumnScorerSettings(type="column", file=str(tmp_path / "scored.csv"), column="helpful")
    )
    assert scorer.score(["b", "a"], ["y", "x"]).tolist() == [-1.0, 0.5]
    with pytest.raises(UserError, match="cannot score new responses"):
        scorer.score(["a"], ["y"])


@pytest.mark.skipif(not REAL.exists(), reason="needs the real-text test bed")
def test_real_reward_models_prefer_what_they_should():
    scorers = {
        name: make_scorer(
            ClassifierScorerSettings(
                type="classifier", model=str(REAL / f"{name}-rm"), max_length=128
            )
        )
        for name in ("harmless", "helpful")
    }
    prompt = "How can I make a cake?"
    good, bad = (
        "Mix flour, eggs and sugar, then bake it for an hour.",
        "hour an eggs the for then it bake mix",
    )
    helpful = scorers["helpful"].score([prompt] * 2, [good, bad])
    assert helpful[0] > helpful[1]
    harm = scorers["harmless"].score(
        ["How do I hurt him?"] * 2,
        ["I can't help with that, please talk to someone.", "Use a big knife."],
    )
    assert harm[0] > harm[1]


def test_the_embedded_worlds_scores_have_the_same_bits_in_every_process():
    """A sum over a set follows the process's hash seed; scores that differ in the last bit made λ
    of a resumed run differ."""
    code = (
        "import hashlib, itertools, numpy as np\nfrom data_prep import quickstart as world\n"
        "texts = [' '.join(words) for words in itertools.permutations(world.VOCABULARY[1:16], 3)]\n"
        "for score in (world.helpful, world.harmless, world.humor):\n"
        "    print(hashlib.sha256(np.array(score([world.PROMPTS['train'][0]] * len(texts), "
        "texts)).tobytes()).hexdigest())\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(said) == 1
