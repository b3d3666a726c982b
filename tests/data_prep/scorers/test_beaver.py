"""The beaver scorer against a Llama written out in plain torch; checkpoints of the two published
layouts and of neither."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.scorers.model_settings import BeaverScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.beaver import PROMPTS, RESPONSES, TEMPLATE, plain_score, save_beaver


def plain_scores(folder, tensors, append_eos) -> np.ndarray:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores, end = [], " </s>" if append_eos else ""
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT: {response}{end}"
        scores.append(plain_score(tensors, tokenizer(text)["input_ids"]))
    return np.array(scores)


def settings(folder, **more):
    return BeaverScorerSettings(
        type="beaver", model=str(folder), dtype="float32", **({"template": TEMPLATE} | more)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalizer", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_scores_equal_a_llama_in_plain_torch(tmp_path, bias, normalizer, padding_side):
    """Batched, padded on either side, with buffers of a normalizer that the config does not switch
    on."""
    tensors = save_beaver(
        tmp_path,
        bias=bias,
        normalizer=normalizer,
        architecture="LlamaModelForScore" if bias else "LlamaForScore",
        padding_side=padding_side,
    )
    expected = plain_scores(tmp_path, tensors, append_eos=True)
    assert expected.std() > 0.1
    for batch_size in (4, 1):
        scores = make_scorer(settings(tmp_path, batch_size=batch_size)).score(PROMPTS, RESPONSES)
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_eos_is_explicit_and_part_of_the_identity(tmp_path):
    tensors = save_beaver(tmp_path, pad=False)
    scorers = {eos: make_scorer(settings(tmp_path, append_eos=eos)) for eos in (True, False)}
    for eos, scorer in scorers.items():
        np.testing.assert_allclose(
            scorer.score(PROMPTS, RESPONSES), plain_scores(tmp_path, tensors, eos), atol=1e-5
        )
    assert scorers[True].encode("sing", "no")[:-1] == scorers[False].encode("sing", "no")
    assert scorers[True].fingerprint != scorers[False].fingerprint
    assert (
        make_scorer(settings(tmp_path, batch_size=2, device="cpu")).fingerprint
        == scorers[True].fingerprint
    )
    tensors["score_head.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert make_scorer(settings(tmp_path)).fingerprint != scorers[True].fingerprint


@pytest.mark.parametrize(
    ("score_type", "function"), [("reward", lambda s: (s + 3) / 2.5), ("cost", lambda s: s / 2.5)]
)
def test_the_normalizer_applies_where_the_config_says_so(tmp_path, score_type, function):
    tensors = save_beaver(tmp_path, normalizer=True, do_normalize=True, score_type=score_type)
    scorer = make_scorer(settings(tmp_path, negate=score_type == "cost"))
    expected = function(plain_scores(tmp_path, tensors, append_eos=True))
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_half_precision_keeps_head_and_score_in_float32(tmp_path):
    tensors = save_beaver(tmp_path)
    scorer = make_scorer(settings(tmp_path).model_copy(update={"dtype": "bfloat16"}))
    assert scorer.model.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(scorer.model.score_head.weight, tensors["score_head.weight"])
    expected = plain_scores(tmp_path, tensors, append_eos=True)
    np.testing.assert_allclose(scorer.score(PROMPTS, RESPONSES), expected, atol=0.3)


def test_texts_over_the_window_are_an_error_or_counted(tmp_path):
    save_beaver(tmp_path)
    with pytest.raises(UserError, match="exceeds its window of 12"):
        make_scorer(settings(tmp_path, max_length=12)).score(PROMPTS, RESPONSES)
    scorer = make_scorer(settings(tmp_path, max_length=12, truncate=True))
    assert np.isfinite(scorer.score(PROMPTS, RESPONSES)).all() and scorer.truncated > 0
    ids, tokenizer = scorer.encode(PROMPTS[2], RESPONSES[3]), scorer.tokenizer
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert scorer.tokenizer.decode(ids).endswith(f"{RESPONSES[3]} </s>")


def remove(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remove("score_head.weight"), "missing from a Beaver checkpoint: score_head.weight"),
        (
            remove("model.layers.1.mlp.up_proj.weight"),
            r"missing from .*: model.layers.1.mlp.up_proj.weight \(1 in all\)",
        ),
        (
            lambda t: t | {"lm_head.weight": torch.zeros(3, 32)},
            "not expected in a Beaver checkpoint: lm_head.weight",
        ),
        (
            lambda t: t | {"score_head.weight": torch.zeros(2, 32)},
            r"of another shape in .*score_head\.weight",
        ),
    ],
)
def test_another_layout_is_refused(tmp_path, change, match):
    tensors = save_beaver(tmp_path)
    save_file(change(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=match):
        make_scorer(settings(tmp_path))


def test_configs_that_contradict_the_recipe_are_refused(tmp_path):
    save_beaver(tmp_path / "a", architecture="LlamaForCausalLM")
    with pytest.raises(UserError, match="not a Beaver score model"):
        make_scorer(settings(tmp_path / "a"))
    save_beaver(tmp_path / "b", score_type="cost")
    with pytest.raises(UserError, match="set negate: true"):
        make_scorer(settings(tmp_path / "b"))
    save_beaver(tmp_path / "c", do_normalize=True)
    with pytest.raises(
        UserError, match=r"do_normalize, but neither it nor the checkpoint holds normalizer\.mean"
    ):
        make_scorer(settings(tmp_path / "c"))
    with pytest.raises(UserError, match=r"does not contain \{response\}"):
        make_scorer(settings(tmp_path / "b", template="{prompt}", negate=True))


def test_old_uploads_carry_rotary_buffers(tmp_path):
    tensors, file = save_beaver(tmp_path, bias=False), tmp_path / "model.safetensors"
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    buffers = {name: torch.ones(4) for name in names}
    save_file(tensors | buffers, file, metadata={"format": "pt"})
    assert load_file(file).keys() > tensors.keys()
    expected = plain_scores(tmp_path, tensors, append_eos=True)
    scores = make_scorer(settings(tmp_path)).score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
