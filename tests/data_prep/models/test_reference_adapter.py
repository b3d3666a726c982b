"""π_ref = base + supervised adapter: merged before quantization, one fingerprint per adapter, and
adapters of another base are refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy, resolve_model
from data_prep.models.settings import PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.models import save_adapter, save_tiny_causal_lm, save_word_tokenizer

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 12, 2], [13, 14, 15, 16], [17, 2]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "constrained-dpo"


def settings(base, adapter=None, **more):
    plain = {"model": str(base), "quantization": "none", "dtype": "float32"}
    reference = None if adapter is None else str(adapter)
    return PolicySettings(**(plain | {"reference_adapter": reference} | more))


def logps(model):
    return response_logps(model, PROMPTS, RESPONSES, pad_id=3, batch_size=2)


def test_log_probabilities_are_those_of_base_plus_adapter(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(base, tmp_path / "sft")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    ).eval()
    policy = load_policy(settings(base, adapter))
    np.testing.assert_allclose(logps(policy.model), logps(plain), atol=1e-4)
    assert np.abs(logps(policy.model) - logps(load_policy(settings(base)).model)).max() > 0.1
    assert not any(p.requires_grad for p in policy.model.parameters()) and not any(
        "lora" in n for n, _ in policy.model.named_parameters()
    )


def test_merging_comes_before_quantization_and_a_policy_adapter_goes_on_top(base, tmp_path):
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = settings(base, save_adapter(base, tmp_path / "sft"), quantization="nf4")
    policy = load_policy(chosen)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in policy.model.modules()) == 14
    merged = AutoModelForCausalLM.from_pretrained(resolve_model(chosen), dtype=torch.float32)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in merged.modules())
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    merged.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    for module in again.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    np.testing.assert_allclose(logps(policy.model), logps(again.eval()), atol=1e-5)
    before = logps(policy.model)
    with attached_adapter(policy, save_adapter(base, tmp_path / "policy", seed=7)) as model:
        assert np.abs(logps(model) - before).max() > 0.01
    np.testing.assert_array_equal(logps(policy.model), before)


def test_every_adapter_is_another_reference_and_none_is_merged_twice(base, tmp_path, cache):
    one, two = (
        save_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))
    )
    fingerprints = [
        load_policy(settings(base, adapter)).fingerprint for adapter in (None, one, two)
    ]
    assert len(set(fingerprints)) == 3
    folders = sorted(cache.glob("merged-*"))
    assert len(folders) == 2 and resolve_model(settings(base, one)) in map(str, folders)
    stamps = [f.stat().st_mtime_ns for f in folders]
    assert load_policy(settings(base, one)).fingerprint == fingerprints[1]
    assert [f.stat().st_mtime_ns for f in sorted(cache.glob("merged-*"))] == stamps
    shutil.rmtree(cache)
    assert load_policy(settings(base, one)).fingerprint == fingerprints[1], (
        "merged again, it is the same reference"
    )
    assert resolve_model(settings(base, one, dtype="bfloat16")) != resolve_model(
        settings(base, one)
    )
    scale = json.loads((one / "adapter_config.json").read_text())
    (one / "adapter_config.json").write_text(
        json.dumps(scale | {"lora_alpha": scale["lora_alpha"] * 2})
    )
    assert load_policy(settings(base, one)).fingerprint not in fingerprints


def test_what_a_killed_merge_left_is_cleared_away(base, tmp_path, cache):
    chosen = settings(base, save_adapter(base, tmp_path / "sft"))
    folder = resolve_model(chosen)
    left = cache / f".{folder.rpartition('/')[2]}.tmp"
    shutil.move(folder, left)
    (left / "model.safetensors").write_bytes(b"half")
    assert resolve_model(chosen) == folder and not left.exists()
    load_policy(chosen)


def test_the_adapters_own_tokenizer_is_used(base, tmp_path):
    adapter = save_adapter(base, tmp_path / "sft")
    without = load_policy(settings(base, adapter))
    shutil.copy(base / "tokenizer.json", adapter)
    raw = json.loads((base / "tokenizer_config.json").read_text()) | {
        "chat_template": "{{ messages[0]['content'] }}"
    }
    (adapter / "tokenizer_config.json").write_text(json.dumps(raw))
    with_template = load_policy(settings(base, adapter))
    assert without.tokenizer.chat_template is None and with_template.tokenizer.chat_template
    assert with_template.fingerprint != without.fingerprint
    save_word_tokenizer(adapter, " ".join(f"w{i}" for i in range(99)))
    with pytest.raises(UserError, match=r"a tokenizer of 103 tokens, .* embeds 64"):
        load_policy(settings(base, adapter))


def rename_base(adapter, name):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": name})
    )


def test_adapters_of_another_base_are_refused(base, tmp_path, cache):
    other = save_tiny_causal_lm(tmp_path / "other", seed=1)
    with pytest.raises(
        UserError, match=r"policy\.reference_adapter: .* was trained on .*other, not on"
    ):
        load_policy(settings(base, save_adapter(other, tmp_path / "a")))
    rename_base(tmp_path / "a", str(base))
    # The same shapes, and the user says that it is the same model.
    load_policy(settings(base, tmp_path / "a"))
    wide = save_adapter(save_tiny_causal_lm(tmp_path / "wide", width=64), tmp_path / "b")
    rename_base(wide, "")
    with pytest.raises(UserError, match=r"does not fit .*size mismatch.*adapter of another base"):
        load_policy(settings(base, wide))
    for name, layers in (("shallow", 1), ("deep", 3)):
        adapter = save_adapter(
            save_tiny_causal_lm(tmp_path / name, layers=layers), tmp_path / f"{name}-adapter"
        )
        rename_base(adapter, "")
        with pytest.raises(
            UserError, match=r"does not fit .*layers\.\d.* in adapter_model\.safetensors"
        ):
            load_policy(settings(base, adapter))
    assert len(list(cache.glob("merged-*"))) == 1


def test_folders_that_are_no_lora_adapter_are_refused(base, tmp_path):
    with pytest.raises(UserError, match=r"policy\.reference_adapter: .*nowhere is not a folder"):
        load_policy(settings(base, tmp_path / "nowhere"))
    adapter = save_adapter(base, tmp_path / "a")
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(raw | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="of PEFT type IA3; only LORA"):
        load_policy(settings(base, adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_policy(settings(base, adapter))
