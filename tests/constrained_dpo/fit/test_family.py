"""A family and its members (DESIGN §7: invariant 11): the ordinary adapter at (λ, κ) is the gated
model at that λ and κ; what a family's folder is, and what cannot be gated."""

import copy
import json
import shutil

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from safetensors.torch import load_file

from constrained_dpo.fit.adapter import save_adapter
from constrained_dpo.fit.family import (
    FAMILY_FILE,
    FAMILY_WEIGHTS,
    is_family,
    read_family,
    seal_family,
    write_member,
)
from constrained_dpo.fit.gates import Gates
from constrained_dpo.fit.trainer import FitPlan
from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.sampling.logprobs import response_logps
from tests.helpers.families import CONFIGS, SIZE
from tests.helpers.fits import (
    LORA,
    built_trainer,
    fit_settings,
    gated_rows,
    make_family,
    ragged_rows,
    randomize,
)
from tests.helpers.models import save_tiny_causal_lm, save_word_tokenizer

HEAD = LORA.model_copy(update={"target_modules": ["q_proj", "down_proj", "lm_head"]})
TOLERANCE = 1e-5  # nats per token
ROWS = 6


def log_ratios(trainer, rows) -> torch.Tensor:
    """log π_θ/π_ref of the rows' responses, all rows in one batch: (num_rows, 2)."""
    trainer.model.eval()
    with torch.no_grad():
        batch = trainer.data_collator(list(rows))
        return trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]


def save_family(trainer, family, folder):
    """The trainer's gated adapter, saved as a fit saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = FitPlan(fit_settings(), LORA, 0.25, 0, output=folder / "family", family=family)
    save_adapter(trainer.model, None, "{}", folder / ".family.tmp", plan)
    return plan.output


def multipliers(row: dict, family) -> pd.Series:
    return pd.Series({name: row[f"lambda/{name}"] for name in family.units})


def member_log_ratios(policy, folder, family, rows, output) -> np.ndarray:
    """The same of each row's own member, an ordinary adapter that PEFT loads."""
    ratios = []
    for number, row in enumerate(rows):
        adapter = output / str(number)
        write_member(folder, multipliers(row, family), row["kappa"], adapter)
        with attached_adapter(policy, adapter) as model:
            assert isinstance(model, PeftModel)
            prompts = [row["prompt_ids"]] * 2
            logps = response_logps(model, prompts, row["responses_ids"], pad_id=0, batch_size=2)
        ratios.append(logps - np.asarray(row["ref_logps"]))
    return np.array(ratios)


def largest_difference(policy, family, folder, *, shared: bool, lora=LORA) -> float:
    """Between the gated model and its members, nats per token; each row has gates of its own."""
    rows = gated_rows(ragged_rows(policy, ROWS, seed=0), family)
    settings = {"batch_size": ROWS, "shared_prompts": shared, "lora": lora, "family": family}
    with built_trainer(policy, rows, folder / "fit", **settings) as trainer:
        assert (trainer.padded_because is None) == shared, trainer.padded_because
        randomize(trainer)
        gated = log_ratios(trainer, rows).double().numpy()
        ungated = rows.remove_columns(["gates"]).add_column(
            "gates", [[1.0] * family.num_blocks] * ROWS
        )
        assert np.abs(gated - log_ratios(trainer, ungated).numpy()).max() > 0.1
        saved = save_family(trainer, family, folder)
    members = member_log_ratios(policy, saved, family, rows, folder / "members")
    assert np.abs(members).max() > 0.5
    lengths = np.array([[len(ids) for ids in pair] for pair in rows["responses_ids"]])
    return float(np.max(np.abs(gated - members) / lengths))


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize("names", [("harmless",), ("harmless", "short")], ids=["one", "two"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_gated_model_is_its_member(
    quickstart_policy, plain_policy, quantization, names, shared, tmp_path
):
    policy = quickstart_policy if quantization == "nf4" else plain_policy
    family = make_family(*names, kappa=(0.5, 1.5))
    assert largest_difference(policy, family, tmp_path, shared=shared) < TOLERANCE


def test_on_an_int8_base_too(tmp_path):
    """Its layers round their inputs to 8 bits, so that the last bit of one layer is a step of the
    next: less exact, whatever the adapter."""
    settings = PolicySettings(model="quickstart", quantization="int8", dtype="float32")
    difference = largest_difference(load_policy(settings), make_family(), tmp_path, shared=False)
    assert difference < 0.05


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_with_an_adapter_on_the_head(
    quickstart_policy, plain_policy, quantization, shared, tmp_path
):
    policy = quickstart_policy if quantization == "nf4" else plain_policy
    family = make_family("harmless", "short")
    assert largest_difference(policy, family, tmp_path, shared=shared, lora=HEAD) < TOLERANCE


@pytest.fixture(scope="module")
def tied_policy(tmp_path_factory):
    """A model whose head is its embeddings."""
    base = save_tiny_causal_lm(tmp_path_factory.mktemp("tied") / "base")
    tied = transformers.AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(base)
    settings = PolicySettings(model=str(base), quantization="none", dtype="float32")
    return load_policy(settings)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared"])
def test_with_an_adapter_on_a_tied_head(tied_policy, shared, tmp_path):
    embeddings = tied_policy.model.get_input_embeddings().weight
    assert tied_policy.model.get_output_embeddings().weight is embeddings
    before = embeddings.clone()
    difference = largest_difference(tied_policy, make_family(), tmp_path, shared=shared, lora=HEAD)
    assert difference < TOLERANCE and torch.equal(before, embeddings)


def test_a_member_is_the_weights_merged_by_hand(plain_policy, tmp_path):
    """W + scale · B diag(c) A, c by hand: κ for the reward's block and κ λ_i/ν_i for each other."""
    lora = LoraSettings(r=2, alpha=6, dropout=0.0, target_modules=["q_proj", "down_proj"])
    family = make_family("harmless", "short", rank=2)
    rows = gated_rows(ragged_rows(plain_policy, ROWS, seed=0), family)
    settings = {"batch_size": ROWS, "lora": lora, "family": family}
    with built_trainer(plain_policy, rows, tmp_path / "fit", **settings) as trainer:
        randomize(trainer)
        gated = log_ratios(trainer, rows).double().numpy()
        weights = load_file(save_family(trainer, family, tmp_path) / FAMILY_WEIGHTS)
    for row, ratio in zip(rows, gated, strict=True):
        merged = copy.deepcopy(plain_policy.model)
        one = row["kappa"]
        two, three = one * row["lambda/harmless"] / 0.5, one * row["lambda/short"] / 0.6
        c = torch.diag(torch.tensor([one, one, two, two, three, three], dtype=torch.float32))
        for name in [name for name in weights if ".lora_A." in name]:
            down, up = weights[name], weights[name.replace("lora_A", "lora_B")]
            layer = merged.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            layer.weight.data += 3.0 * up @ c @ down
        prompts = [row["prompt_ids"]] * 2
        logps = response_logps(merged, prompts, row["responses_ids"], pad_id=0, batch_size=2)
        np.testing.assert_allclose(logps - np.asarray(row["ref_logps"]), ratio, atol=1e-4)


@pytest.fixture(scope="module")
def saved(plain_policy, tmp_path_factory):
    """A family's folder, and what it is."""
    family = make_family("harmless", "short", kappa=(0.5, 1.5))
    folder = tmp_path_factory.mktemp("saved")
    rows = gated_rows(ragged_rows(plain_policy, ROWS, seed=0), family)
    with built_trainer(plain_policy, rows, folder / "fit", family=family) as trainer:
        randomize(trainer)
        return save_family(trainer, family, folder), family


def test_peft_loads_no_family_and_members_are_ordinary_adapters(plain_policy, saved, tmp_path):
    folder, _ = saved
    assert {file.name for file in folder.iterdir()} == {
        FAMILY_FILE,
        FAMILY_WEIGHTS,
        "training_log.json",
    }
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(copy.deepcopy(plain_policy.model), str(folder))
    with pytest.raises((ValueError, OSError)):
        load_peft_weights(str(folder))
    with pytest.raises(UserError), attached_adapter(plain_policy, folder):
        pass
    write_member(folder, pd.Series({"short": 0.0, "harmless": 0.5}), 2.0, tmp_path / "member")
    assert not is_family(tmp_path / "member")
    family_weights = load_file(folder / FAMILY_WEIGHTS)
    weights = load_file(tmp_path / "member" / "adapter_model.safetensors")
    assert weights.keys() == family_weights.keys()
    scale = torch.tensor([2.0] * 8 + [0.0] * 4)[:, None]  # rank 4: r, harmless at its unit, none
    for name, value in weights.items():
        expected = family_weights[name] * (scale if "lora_A" in name else 1.0)
        torch.testing.assert_close(value, expected, atol=0, rtol=1e-6)
    config = json.loads((tmp_path / "member" / "adapter_config.json").read_text())
    assert config["r"] == 12 and config["lora_alpha"] == 24
    assert not list(tmp_path.glob(".*"))


def test_a_family_is_read_as_it_was_sealed(saved, tmp_path):
    folder, family = saved
    assert is_family(folder) and read_family(folder) == family and family.num_blocks == 3
    assert list(read_family(folder).units) == ["harmless", "short"]  # the order of the blocks
    write_member(folder, pd.Series({"harmless": 1.0, "short": 1.0}), 1.0, tmp_path / "again")
    one = make_family("harmless")
    seal_family(tmp_path / "again", one)
    assert read_family(tmp_path / "again") == one


def test_gates_are_kappa_times_lambda_in_its_unit():
    family = make_family("harmless", "short")
    table = pd.DataFrame({"short": [0.6, 0.0], "harmless": [1.0, 0.25], "other": [9.0, 9.0]})
    expected = [[2.0, 4.0, 2.0], [0.5, 0.25, 0.0]]
    np.testing.assert_allclose(family.gates(table, np.array([2.0, 0.5])), expected)
    np.testing.assert_allclose(family.gates(table)[0], [1.0, 2.0, 1.0])


def test_what_is_no_family_or_damaged_is_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no family \(family\.json\)"):
        read_family(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no family"):
        write_member(tmp_path / "empty", pd.Series({"harmless": 1.0}), 1.0, tmp_path / "member")
    for name, text in (("half", "{"), ("bare", "{}"), ("rank", '{"family": {"rank": 4}}')):
        folder = tmp_path / name
        shutil.copytree(saved[0], folder)
        (folder / FAMILY_FILE).write_text(text)
        with pytest.raises(UserError, match=r"family\.json"):
            read_family(folder)


def test_a_variant_and_an_embedding_cannot_be_gated(plain_policy, tmp_path):
    for changes, match in (({"use_dora": True}, "DoRA"), ({}, "an embedding")):
        targets = ["q_proj"] if changes else ["embed_tokens"]
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **changes)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
        with pytest.raises(UserError, match=f"fit.conditional: .*cannot be gated.*{match}"):
            Gates(2).attach(get_peft_model(model, config))
    rows = gated_rows(ragged_rows(plain_policy, 2, seed=0), make_family())
    lora = LORA.model_copy(update={"target_modules": ["q_proj", "embed_tokens"]})
    policy = copy.deepcopy(plain_policy)
    with (
        pytest.raises(UserError, match=r"fit\.conditional: .*embed_tokens cannot be gated"),
        built_trainer(policy, rows, tmp_path, lora=lora, family=make_family()),
    ):
        pass


def test_a_layer_that_sees_the_tokens_of_several_rows_together_is_refused(tmp_path):
    """The shared expert of a mixture of experts."""
    size = save_word_tokenizer(tmp_path / "model", " ".join(f"w{i}" for i in range(60)))
    changes = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 2}
    changes |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = transformers.Qwen2MoeConfig(**SIZE | changes, shared_expert_intermediate_size=16)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    settings = PolicySettings(model=str(tmp_path / "model"), quantization="none", dtype="float32")
    policy = load_policy(settings)
    rows: datasets.Dataset = gated_rows(ragged_rows(policy, 4, seed=0), make_family())
    lora = LORA.model_copy(update={"target_modules": ["q_proj", "gate_proj"]})
    with built_trainer(policy, rows, tmp_path, lora=lora, family=make_family()) as trainer:
        with pytest.raises(UserError) as refused:
            log_ratios(trainer, rows)
        assert "shared_expert.gate_proj sees the tokens of several rows" in str(refused.value)
        assert "\n" not in str(refused.value)
