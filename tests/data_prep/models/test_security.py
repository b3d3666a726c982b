"""Nothing that comes with a model is executed, and no pickle is opened, unless the recipe says so
for that model; devices asked for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.checkpoints import fingerprint_model
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.scorers.model_settings import BeaverScorerSettings, ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from tests.helpers.beaver import save_beaver
from tests.helpers.models import save_classifier, save_tiny_causal_lm

CUDA = torch.cuda.is_available()


def policy_logits(folder, **keys):
    policy = load_policy(
        PolicySettings(model=str(folder), quantization="none", dtype="float32", **keys)
    )
    with torch.no_grad():
        return policy.model(torch.tensor([[5, 6, 7]], device=policy.device)).logits.cpu().numpy()


def classifier_scores(folder, **keys):
    return make_scorer(
        ClassifierScorerSettings(type="classifier", model=str(folder), **keys)
    ).score(["ask a"], ["say b"])


def beaver_scores(folder, **keys):
    return make_scorer(
        BeaverScorerSettings(type="beaver", model=str(folder), dtype="float32", **keys)
    ).score(["sing"], ["no"])


MODELS = {
    "policy": (save_tiny_causal_lm, policy_logits, "policy.allow_pickle: true"),
    "classifier": (
        lambda folder: save_classifier(folder, "ask say a b"),
        classifier_scores,
        "the scorer's allow_pickle: true",
    ),
    "beaver": (save_beaver, beaver_scores, "the scorer's allow_pickle: true"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_pickled_weights_need_the_key_and_enter_the_fingerprint(kind, tmp_path):
    save, values, key = MODELS[kind]
    folder = tmp_path / "model"
    save(folder)
    expected = values(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    with_both = fingerprint_model(str(folder), None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=rf"has only pickled weights \(pytorch_model\.bin\); .*set {key}"
    ):
        values(folder)
    np.testing.assert_allclose(values(folder, allow_pickle=True), expected, atol=1e-6)
    pickled = fingerprint_model(str(folder), None)
    torch.save(
        {k: v + 1 for k, v in torch.load(folder / "pytorch_model.bin").items()},
        folder / "pytorch_model.bin",
    )
    assert len({with_both, pickled, fingerprint_model(str(folder), None)}) == 3


def test_a_hub_model_with_pickled_weights_only_is_named_the_key(tmp_path, monkeypatch):
    """A hub cache as a download leaves it: the absence of safetensors is on record."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--somebody--model", "c" * 40
    folder = repository / "snapshots" / commit
    save_tiny_causal_lm(folder)
    expected = policy_logits(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    absent = [f".no_exist/{commit}/model.safetensors{ending}" for ending in ("", ".index.json")]
    for name, content in (("refs/main", commit), *((name, "") for name in absent)):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content)
    with pytest.raises(
        UserError,
        match=r"policy\.model: somebody/model has no safetensors weights; .*set "
        r"policy\.allow_pickle: true",
    ):
        policy_logits("somebody/model")
    np.testing.assert_allclose(
        policy_logits("somebody/model", allow_pickle=True), expected, atol=1e-6
    )
    fingerprint = fingerprint_model("somebody/model", None)
    (repository / "refs" / "main").write_text("d" * 40)
    folder.rename(repository / "snapshots" / ("d" * 40))
    assert fingerprint_model("somebody/model", None) != fingerprint, (
        "another commit is another model"
    )


def test_a_policy_adapter_is_safetensors(plain_policy, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with (
        pytest.raises(UserError, match=r"adapter: .* has no adapter_model\.safetensors"),
        attached_adapter(plain_policy, tmp_path),
    ):
        pass


class Bomb:
    """What a hostile pickle is: an object whose unpickling calls a function."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", MODELS)
def test_an_allowed_pickle_still_calls_nothing(kind, tmp_path):
    save, values, _ = MODELS[kind]
    folder, marker = tmp_path / "model", tmp_path / "marker"
    save(folder)
    torch.save(
        load_file(folder / "model.safetensors") | {"bomb": Bomb(marker)},
        folder / "pytorch_model.bin",
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        values(folder, allow_pickle=True)
    assert not marker.exists()


REMOTE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import LlamaForSequenceClassification
class OwnConfig(LlamaConfig):
    model_type = "own_kind"
class OwnCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnClassifier(LlamaForSequenceClassification):
    config_class = OwnConfig
class OwnModel(LlamaModel):
    config_class = OwnConfig
AutoModel.register(OwnConfig, OwnModel)
"""


def ship_code(folder, marker, model_type):
    """Lets the checkpoint bring its own modelling code, which writes a marker when it is
    imported."""
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    raw = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    classes = {
        "AutoConfig": "OwnConfig",
        "AutoModelForCausalLM": "OwnCausalLM",
        "AutoModelForSequenceClassification": "OwnClassifier",
    }
    raw["auto_map"] = {auto: f"own.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(raw))


OWN_CODE = [
    ("policy", "policy.trust_remote_code: true"),
    ("classifier", "the scorer's trust_remote_code: true"),
]


@pytest.mark.parametrize(("kind", "key"), OWN_CODE)
def test_code_of_a_checkpoint_runs_only_with_the_key(kind, key, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("transformers asked on the terminal")
    )
    save, values, _ = MODELS[kind]
    folder, marker = tmp_path / f"model_{kind}", tmp_path / "marker"
    save(folder)
    expected = values(folder)
    ship_code(folder, marker, "own_kind")
    with pytest.raises(
        UserError, match=f"needs modelling code of its own, which is not run; .*{key}"
    ):
        values(folder)
    assert not marker.exists()
    np.testing.assert_allclose(values(folder, trust_remote_code=True), expected, atol=1e-6)
    assert marker.read_text() == "executed"


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_transformers_knows_is_loaded_without_its_code(kind, tmp_path):
    save, values, _ = MODELS[kind]
    folder, marker = tmp_path / "model", tmp_path / "marker"
    save(folder)
    expected = values(folder)
    before = fingerprint_model(str(folder), None)
    ship_code(folder, marker, "llama")
    np.testing.assert_allclose(values(folder), expected, atol=1e-6)
    assert not marker.exists() and fingerprint_model(str(folder), None) != before


@pytest.mark.skipif(CUDA, reason="the machine has a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_a_gpu_asked_for_and_absent_is_an_error(kind, tmp_path):
    save, values, _ = MODELS[kind]
    save(tmp_path / "model")
    with pytest.raises(
        UserError, match="device: cuda was asked for but torch sees no GPU; set it to auto or cpu"
    ):
        values(tmp_path / "model", device="cuda")
    np.testing.assert_array_equal(
        values(tmp_path / "model", device="cpu"), values(tmp_path / "model", device="auto")
    )


def test_a_fit_runs_where_the_policy_is(tmp_path):
    from constrained_dpo.fit.build import training_config
    from constrained_dpo.fit.trainer import FitPlan
    from constrained_dpo.recipe.fit import FitSettings
    from data_prep.models.settings import LoraSettings

    plan = FitPlan(FitSettings(steps=1), LoraSettings(), 0.1, 0, tmp_path)
    assert training_config(plan, "cpu").use_cpu
    if CUDA:
        assert not training_config(plan, "cuda").use_cpu
