"""Architectures × pad token × text format × batch × padding side: every score equals one plain
unpadded forward, or is refused in words."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.models import save_word_tokenizer

# The third response ends in what the EOS token looks like and the fourth holds it inside: typed by
# a person, it is text, and neither may be taken for padding.
PROMPTS = ["open the door", "sing", "a longer request", "open", "sing"]
RESPONSES = ["no", "la la la la la", "la </s>", "yes </s> of", ""]
TEMPLATE = "ask {prompt} say {response}"
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ '</s>' }}{% endfor %}"
)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 160,
}
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
DEBERTA_V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
}
ARCHITECTURES = {
    "Bert": SIZES,
    "DebertaV2": SIZES | DEBERTA_V3 | {"share_att_key": True, "position_biased_input": False},
    "Roberta": SIZES,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160},
    "Llama": DECODER,
    "Qwen2": DECODER,
    "Qwen3": DECODER,
    "Gemma2": DECODER | {"sliding_window": 4},
    "Gemma3Text": DECODER
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
NAMES = {"Gemma3Text": "Gemma3TextForSequenceClassification"}
ENCODERS = ("Bert", "DebertaV2", "Roberta")


def tokenizer_with(pad: str, side: str):
    """A byte tokenizer that opens with <s> and has <sep> between the texts of a pair, and its size.
    pad: separate, eos, missing, none (no EOS either)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<s>", "</s>", "<sep>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {w: i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [("<s>", vocabulary["<s>"]), ("<sep>", vocabulary["<sep>"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <sep> $B:1", special_tokens=special
    )
    tokens = {"eos_token": "</s>"} if pad != "none" else {}
    pads = {"separate": {"pad_token": "<pad>"}, "eos": {"pad_token": "</s>"}}
    tokens |= pads.get(pad, {})
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", padding_side=side, **tokens
    )
    loaded.chat_template = CHAT
    return loaded, len(vocabulary)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    """(folder, architecture, plain scores by text format): a random classifier, and each text alone
    and unpadded through transformers."""
    import transformers

    name = request.param
    folder = tmp_path_factory.mktemp(name)
    tokenizer, size = tokenizer_with("separate", "right")
    config_class = getattr(transformers, f"{name}Config")
    pad = {"pad_token_id": 1} if name in ENCODERS else {"pad_token_id": None}
    torch.manual_seed(0)
    config = config_class(
        vocab_size=size, num_labels=1, bos_token_id=2, eos_token_id=3, **pad, **ARCHITECTURES[name]
    )
    model = getattr(transformers, NAMES.get(name, f"{name}ForSequenceClassification"))(
        config
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn_like(parameter)
            )  # a fresh model's scores hardly depend on its text
    model.save_pretrained(folder)

    def plain(prompt: str, response: str, text: str) -> float:
        typed = {"return_tensors": "pt", "split_special_tokens": True}
        if text == "pair":
            encoded = tokenizer(prompt, response, **typed)
        elif text == "template":
            encoded = tokenizer(f"ask {prompt} say {response}", **typed)
        else:
            turns = tokenizer(
                [f"user {prompt}", f"assistant {response}"],
                add_special_tokens=False,
                split_special_tokens=True,
            ).input_ids
            encoded = {"input_ids": torch.tensor([[2, *turns[0], 3, *turns[1], 3]])}
        with torch.no_grad():
            return model(**encoded).logits.item()

    texts = list(zip(PROMPTS, RESPONSES, strict=True))
    return (
        folder,
        name,
        {how: [plain(p, r, how) for p, r in texts] for how in ("pair", "template", "chat")},
    )


def scorer_of(folder, text="pair", **keys):
    template = TEMPLATE if text == "template" else None
    return make_scorer(
        ClassifierScorerSettings(
            type="classifier", model=str(folder), text=text, template=template, **keys
        )
    )


# A missing pad token becomes the EOS token, so the two need one side each.
@pytest.mark.parametrize(
    ("pad", "side"), [("separate", "left"), ("missing", "left"), ("eos", "right")]
)
def test_scores_are_those_of_each_text_alone(checkpoint, pad, side):
    folder, name, expected = checkpoint
    tokenizer_with(pad, side)[0].save_pretrained(folder)
    if name == "Qwen2" and pad == "missing":
        # Its tokenizer class adds a pad token of its own, which this model has no embedding for.
        outside = r"pad token <\|endoftext\|> \(261\) lies outside the model's vocabulary of 261"
        with pytest.raises(UserError, match=outside):
            scorer_of(folder)
        return
    scorer = scorer_of(folder)
    for text in ("pair", "template", "chat"):
        assert np.std(expected[text]) > 0.01
        for size in (1, 16):
            # A model is loaded once for six cells; what loading itself checks of a format is in
            # test_classifier.
            cell = {"text": text, "template": TEMPLATE, "batch_size": size}
            scorer.settings = scorer.settings.model_copy(update=cell)
            np.testing.assert_allclose(
                scorer.score(PROMPTS, RESPONSES),
                expected[text],
                atol=1e-4,
                err_msg=f"{text}, batch {size}",
            )


def test_no_pad_and_no_eos_is_refused(checkpoint):
    tokenizer_with("none", "right")[0].save_pretrained(checkpoint[0])
    neither = r"neither a pad nor an EOS token to pad with|lies outside the model's vocabulary"
    with pytest.raises(UserError, match=neither):
        scorer_of(checkpoint[0])


def test_a_new_head_is_refused(checkpoint, tmp_path):
    weights = load_file(checkpoint[0] / "model.safetensors")
    kept = {n: w for n, w in weights.items() if not n.startswith(("classifier", "score"))}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint[0] / "config.json", tmp_path)
    tokenizer_with("separate", "right")[0].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="newly initialised"):
        scorer_of(tmp_path)


def test_a_tokenizer_that_transformers_rebuilds_as_another_is_refused(tmp_path):
    """AutoTokenizer makes a Qwen2Tokenizer of whatever lies in a qwen2 checkpoint: of a word
    tokenizer it makes one that drops words."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    config = Qwen2Config(
        vocab_size=save_word_tokenizer(tmp_path, "open the door"), num_labels=1, **DECODER
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Qwen2Tokenizer reads .*tokenizer\.json otherwise"):
        scorer_of(tmp_path)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"policy\.model: .*Qwen2Tokenizer reads .*tokenizer\.json otherwise"
    ):
        load_policy(PolicySettings(model=str(tmp_path), quantization="none", dtype="float32"))
