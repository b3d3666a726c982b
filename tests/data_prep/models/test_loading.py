"""Checkpoints that their publisher quantized are dequantized or refused, for policy and scorers;
tensors without a place and libraries that are absent are one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.models.checkpoints import explained_loading
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.scorers.model_settings import BeaverScorerSettings, ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.beaver import save_beaver
from tests.helpers.models import save_classifier, save_tiny_causal_lm

HEAD = "lm_head.weight"


def policy(folder, **keys):
    given = {"quantization": "none", "dtype": "float32"} | keys
    return load_policy(PolicySettings(model=str(folder), **given))


def classifier(folder, **keys):
    return make_scorer(ClassifierScorerSettings(type="classifier", model=str(folder), **keys))


def beaver(folder):
    return make_scorer(BeaverScorerSettings(type="beaver", model=str(folder), dtype="float32"))


LOADERS = {
    "policy": (save_tiny_causal_lm, policy),
    "classifier": (lambda folder: save_classifier(folder, "a b"), classifier),
    "beaver": (save_beaver, beaver),
}


def published(folder, **facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": facts}))


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "an unknown method": {"bits": 4},
    "compressed-tensors with 2 kinds of layers": {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {}, "b": {}},
    },
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LOADERS)
def test_what_cannot_be_turned_back_is_refused(kind, method, tmp_path):
    save, load = LOADERS[kind]
    save(tmp_path)
    published(tmp_path, **METHODS[method])
    match = rf"quantized by its publisher \({method}\), which is not turned back .*unquantized base"
    with pytest.raises(UserError, match=match):
        load(tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("load", [policy, classifier])
def test_nothing_is_quantized_twice(load, quantization, tmp_path):
    (save_tiny_causal_lm if load is policy else LOADERS["classifier"][0])(tmp_path)
    published(tmp_path, quant_method="fp8", weight_block_size=[16, 16])
    match = rf"\(fp8\) and cannot be quantized again to {quantization}; .* quantization: none"
    with pytest.raises(UserError, match=match):
        load(tmp_path, quantization=quantization)


def in_blocks(weight, size=16):
    """fp8 and a scale for each block, as DeepSeek and Qwen publish."""
    rows, columns = weight.shape[0] // size, weight.shape[1] // size
    blocks = weight.reshape(rows, size, columns, size)
    scale = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return small, scale


def test_fp8_in_blocks_is_dequantized(tmp_path):
    save_tiny_causal_lm(tmp_path)
    file, stored = tmp_path / "model.safetensors", {}
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"] = in_blocks(weight)
        else:
            stored[name] = weight
    save_file(stored, file, metadata={"format": "pt"})
    published(tmp_path, quant_method="fp8", weight_block_size=[16, 16], activation_scheme="dynamic")
    model = policy(tmp_path).model
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights.get(name, tensor), rtol=0.07, atol=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not getattr(model.config, "quantization_config", None)


def by_row(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def save_compressed(folder):
    """fp8 with a scale per row, as compressed-tensors publishes it; the plain weights."""
    save_tiny_causal_lm(folder)
    file, stored = folder / "model.safetensors", {}
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale"] = by_row(weight)
        else:
            stored[name] = weight
    save_file(stored, file, metadata={"format": "pt"})
    how = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    published(
        folder,
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": how}},
    )
    return weights


def test_compressed_tensors_are_dequantized_or_name_their_package(tmp_path):
    weights = save_compressed(tmp_path)
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"cannot be loaded \(.*pip install compressed-tens"):
            policy(tmp_path)
        return
    model = policy(tmp_path).model
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("kind", ["policy", "classifier"])
def test_scales_without_a_word_in_the_config_are_refused(kind, tmp_path):
    save, load = LOADERS[kind]
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    scales = {f"{n}_scale": torch.ones(1) for n in weights if n.endswith("q_proj.weight")}
    save_file(weights | scales, file, metadata={"format": "pt"})
    match = r"q_proj\.weight_scale, .*\(2 in all\) of the checkpoint have no place in the model"
    with pytest.raises(UserError, match=match):
        load(tmp_path)


def test_tensors_that_an_architecture_computes_itself_are_no_fault(tmp_path):
    save_tiny_causal_lm(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(file) | old, file, metadata={"format": "pt"})
    policy(tmp_path)


def test_a_library_that_is_absent_is_one_line():
    with (
        pytest.raises(UserError, match=r"policy\.model: m cannot be loaded \(sentencepiece is"),
        explained_loading("policy.model", "m"),
    ):
        raise ImportError("\nsentencepiece is needed;\npip install it")
