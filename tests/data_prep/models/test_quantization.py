"""nf4 and int8 that are what they say: fused experts stay in 16 bits and are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from data_prep.errors import UserError
from data_prep.models.quantization import check_quantization, quantization_config

SIZE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {
    "mixtral": MixtralConfig(**SIZE, intermediate_size=64, num_local_experts=4),
    "qwen2 moe": Qwen2MoeConfig(
        **SIZE,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
    ),
}


def loaded(config, folder, quantization):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(quantization, torch.float32)
    )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_are_refused_with_their_share(name, quantization, tmp_path):
    model = loaded(EXPERTS[name], tmp_path, quantization)
    match = rf"policy: {quantization} was asked for but \d\d % of the weights.*in .*experts"
    with pytest.raises(UserError, match=match):
        check_quantization(model, quantization, "policy")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_dense_model_passes_and_kept_modules_count_only_where_they_are_not_named(
    quantization, tmp_path
):
    model = loaded(LlamaConfig(**SIZE, intermediate_size=128), tmp_path, quantization)
    check_quantization(model, quantization, "policy")
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj"):
        check_quantization(model, quantization, "policy")
    check_quantization(model, quantization, "policy", ["up_proj"])
