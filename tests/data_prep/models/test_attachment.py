"""An adapter is taken off again exactly, or refused: whole modules, trained tokens, DoRA, and what
writes into the base's own tensors."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter, merge_adapter
from data_prep.models.attachment import check_lora_only
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.models import save_tiny_causal_lm

PROMPTS, RESPONSES = [[5, 6, 7], [8]], [[11, 12, 2], [13, 14, 15, 16]]


def logps(model):
    return response_logps(model, PROMPTS, RESPONSES, pad_id=3, batch_size=2)


def state(model):
    names = [(name, id(module)) for name, module in model.named_modules()]
    return names, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture
def policy(base):
    return load_policy(PolicySettings(model=str(base), quantization="none", dtype="float32"))


def saved(base, folder, **keys):
    """An adapter with every trainable tensor moved, and its own log-probabilities by PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | keys
    adapted = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder, logps(adapted.eval())


KEPT = {
    "norm": {"modules_to_save": ["norm"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "whole layers beside LoRA": {"modules_to_save": ["mlp"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "embeddings as a target": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KEPT)
def test_the_base_comes_back_exactly_and_switching_off_gives_it_too(kind, base, policy, tmp_path):
    adapter, expected = saved(base, tmp_path / "a", **KEPT[kind])
    names, tensors = state(policy.model)
    reference = logps(policy.model)
    for _ in range(2):
        with attached_adapter(policy, adapter) as model:
            np.testing.assert_allclose(logps(model), expected, atol=1e-4)
            with model.disable_adapter():
                np.testing.assert_array_equal(logps(model), reference)
        assert np.abs(expected - reference).max() > 1e-3
        again, now = state(policy.model)
        assert again == names and all(torch.equal(now[k], tensors[k]) for k in tensors)
        assert not any(p.requires_grad for p in policy.model.parameters())
        np.testing.assert_array_equal(logps(policy.model), reference)


REFUSED = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base when it is attached"),
    "OLoRA": ({"init_lora_weights": "olora"}, "changes the base when it is attached"),
    "biases": ({"bias": "all"}, "trains the base's own biases"),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, "repeats the base's layers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_off_is_refused_before_the_base_is_touched(
    kind, base, policy, tmp_path
):
    keys, message = REFUSED[kind]
    adapter, _ = saved(base, tmp_path / "a", **keys)
    names, tensors = state(policy.model)
    with pytest.raises(UserError, match=message), attached_adapter(policy, adapter):
        pass
    again, now = state(policy.model)
    assert again == names and all(torch.equal(now[k], tensors[k]) for k in tensors)


def test_another_embedding_in_the_file_is_refused(base, policy, tmp_path):
    adapter, _ = saved(base, tmp_path / "a")
    file = adapter / "adapter_model.safetensors"
    words = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(file) | {name: words}, file, metadata={"format": "pt"})
    with attached_adapter(policy, adapter):
        pass
    save_file(load_file(file) | {name: words + 1}, file, metadata={"format": "pt"})
    with (
        pytest.raises(UserError, match=r"holds another model\.embed_tokens\.weight than the base"),
        attached_adapter(policy, adapter),
    ):
        pass
    assert torch.equal(policy.model.get_input_embeddings().weight, words)


def test_adapters_of_another_type_are_refused(base, policy, tmp_path):
    adapter, _ = saved(base, tmp_path / "a")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="of PEFT type IA3"), attached_adapter(policy, adapter):
        pass


@pytest.mark.parametrize("kind", ["norm", "tokens"])
def test_a_server_or_a_warm_start_takes_lora_layers_alone(kind, base, tmp_path):
    adapter, _ = saved(base, tmp_path / "a", **KEPT[kind])
    with pytest.raises(UserError, match=r"warm start: .* holds more than LoRA layers"):
        check_lora_only(adapter, "warm start")
    check_lora_only(saved(base, tmp_path / "plain")[0], "warm start")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["head", "embeddings"])
def test_a_trained_end_of_tied_embeddings_is_merged_as_its_own(kind, tmp_path):
    base = save_tiny_causal_lm(tmp_path / "base")
    tied = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=True)
    tied.tie_weights()
    tied.save_pretrained(base)
    adapter, expected = saved(base, tmp_path / "a", **KEPT[kind])
    settings = PolicySettings(model=str(base), quantization="none", dtype="float32")
    merge_adapter(settings, str(base), adapter, tmp_path / "merged", "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logps(merged.eval()), expected, atol=1e-4)
