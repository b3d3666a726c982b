"""What goes to other tools and comes back: tables in `datasets`, pairs in plain TRL, its adapter
judged here, ours in plain PEFT."""

import json
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from constrained_dpo.estimates.kl import controlled, path_noise
from constrained_dpo.monte_carlo import standard_error
from constrained_dpo.run.create import init_run
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.readers.tables import read_parquet
from data_prep.sampling.logprobs import response_logps
from data_prep.tables import GROUPS, PAIRS
from tests.helpers.cli import cdpo
from tests.helpers.paths import QUICKSTART, SMALL

RELABEL = ["--reward", "helpful", "--lambda", "harmless=0.5"]


@pytest.fixture(scope="module")
def texts(run, tmp_path_factory):
    """The run's pool relabelled under a λ, with texts."""
    path = tmp_path_factory.mktemp("texts") / "pairs.parquet"
    words = ["data", "relabel", run.pool_file(None), *RELABEL, "--pairs-per-prompt", 2, "--text"]
    cdpo(*words, "--prompts", run.path / "prompts.parquet", "-o", path, check=0)
    return path


@pytest.fixture(scope="module")
def outside(base, texts, tmp_path_factory):
    """A LoRA adapter that plain TRL trained for two steps on those pairs, as its documentation does
    it; and the trainer's log."""
    folder = tmp_path_factory.mktemp("trl")
    settings = DPOConfig(
        str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    trainer = DPOTrainer(
        model=str(base),
        args=settings,
        train_dataset=load(texts, folder / "cache"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter", trainer.state.log_history


@pytest.fixture(scope="module")
def evaluated(run, outside) -> dict:
    """What `evaluate` says of that adapter."""
    return evaluate(run, outside[0], 32)


def evaluate(run, adapter, responses: int) -> dict:
    words = ["evaluate", run.path, "--adapter", adapter, "--responses", responses, "--json"]
    return json.loads(cdpo(*words, check=0).stdout)


def plain_peft(base, adapter) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def load(path, folder) -> datasets.Dataset:
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder)
    )


def test_the_pool_and_the_pairs_load_in_plain_datasets(run, texts, tmp_path):
    pool, frame = load(run.pool_file(None), tmp_path), read_parquet(run.pool_file(None))
    assert len(pool) == len(frame) and pool[0]["token_ids"] == frame["token_ids"][0].tolist()
    assert pool["response"][:5] == frame["response"][:5].tolist()
    assert pool[3]["harmless"] == frame["harmless"][3]
    with_texts = [*PAIRS, "prompt", "chosen", "rejected"]
    for path, columns in ((run.pairs_file(0), [*PAIRS]), (texts, with_texts)):
        pairs, frame = load(path, tmp_path), read_parquet(path)
        assert pairs.column_names == columns
        assert pairs.to_pandas().to_dict("list") == frame.to_dict("list")


def test_groups_load_in_plain_datasets(run, tmp_path):
    words = ["data", "relabel", run.pool_file(None), *RELABEL, "--group-size", 4]
    cdpo(*words, "-o", tmp_path / "g.parquet", check=0)
    groups = load(tmp_path / "g.parquet", tmp_path)
    assert groups.column_names == [*GROUPS]
    assert groups.to_pandas().groupby("group_id").size().eq(4).all()


def test_relabelled_texts_train_in_plain_trl(outside, texts):
    adapter, log = outside
    losses = [row["loss"] for row in log if "loss" in row]
    # log 2: the policy starts as the reference
    assert len(losses) == 2 and abs(losses[0] - 0.6931) < 1e-3 and losses[1] != losses[0]
    pairs = read_parquet(texts)
    assert len(pairs) == 2 * pairs["prompt"].nunique() and pairs["chosen"].ne("").all()
    assert (adapter / "adapter_model.safetensors").exists()


def test_an_adapter_of_plain_trl_is_evaluated(run, outside, evaluated):
    assert evaluated["key"].startswith("adapter-adapter-test-")
    assert evaluated["adapter"] == str(outside[0])
    assert set(evaluated["verdicts"]) == {"harmless"}
    assert evaluated["verdict"] in ("satisfied", "violated", "undecided")
    words = ["evaluate", run.path, "--adapter", outside[0], "--responses", 32]
    again = cdpo(*words, check=0).stdout
    assert "verdict" in again and evaluated["key"] in again


def test_it_is_the_adapter_that_was_sampled(run, base, outside, evaluated):
    """The stored log-probabilities are those of plain PEFT on the same base, up to nf4's
    rounding."""
    samples = read_parquet(run.evaluation_folder(evaluated["key"]) / "samples.parquet")
    assert set(samples["prompt_id"]) == set(run.prompts().query("split == 'test'")["prompt_id"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = run.prompts().set_index("prompt_id")["prompt"]
    prompts = [tokenizer(prompt[pid])["input_ids"] for pid in samples["prompt_id"]]
    drawn = [ids.tolist() for ids in samples["token_ids"]]
    plain, pad_id = plain_peft(base, outside[0]), tokenizer.pad_token_id
    logps = response_logps(plain, prompts, drawn, pad_id=pad_id, batch_size=64)
    ratio = samples["policy_logp"] - samples["ref_logp"]
    change = ratio.abs().mean()
    assert change > 0.05 and abs(logps - samples["policy_logp"]).mean() < 0.5 * change
    # KL is the mean of path_kl with the noise that the log-ratio explains taken out: the same means
    prompts, noise = samples["prompt_id"], path_noise(samples)
    own = controlled(samples["path_kl"], noise, prompts).groupby(prompts).mean()
    assert evaluated["kl"] == pytest.approx(own.mean())
    for other in (samples["path_kl"], ratio):
        apart = (other.groupby(prompts).mean() - own).to_numpy()
        assert 0 < abs(apart.mean()) < 4 * standard_error(apart)


def edited(adapter, folder, **config):
    """A copy of an adapter with other words in its config."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_a_changed_adapter_is_evaluated_anew(run, outside, tmp_path):
    changed = edited(outside[0], tmp_path / "adapter", lora_alpha=64)
    keys = {evaluate(run, folder, 2)["key"] for folder in (outside[0], changed)}
    assert len(keys) == 2


REFUSED = {
    "of another base by name": (
        {"base_model_name_or_path": "somebody/else"},
        "was trained on somebody/else",
    ),
    "no LoRA": ({"peft_type": "PROMPT_TUNING"}, "only LORA is supported"),
    "another rank": ({"r": 8}, "of another base, or damaged?) cannot be loaded (size mismatch"),
    "fewer layers": ({"target_modules": ["q_proj"]}, "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_whose_config_is_not_its_own_is_refused(run, outside, tmp_path, refused, kind):
    config, match = REFUSED[kind]
    adapter = edited(outside[0], tmp_path / "adapter", **config)
    refused("evaluate", run.path, "--adapter", adapter, match=match)


def test_an_adapter_of_another_base_is_refused_by_its_name_or_its_shapes(
    run, base, foreign_base, foreign_adapter, tmp_path, refused
):
    words = ("evaluate", run.path, "--adapter")
    match = f"--adapter: {foreign_adapter} was trained on {foreign_base}"
    assert f"not on {base}" in refused(*words, foreign_adapter, match=match)
    silent = edited(foreign_adapter, tmp_path / "silent", base_model_name_or_path=None)
    refused(*words, silent, match="size mismatch")
    refused(*words, tmp_path / "nowhere", match="is not a folder")


def test_an_adapter_needs_a_prepared_run_and_no_round(run, outside, tmp_path, refused):
    refused("evaluate", run.path, "--adapter", outside[0], "--round", "0", match="give one of them")
    unprepared = init_run(QUICKSTART, tmp_path / "run", list(SMALL))
    refused("evaluate", unprepared.path, "--adapter", outside[0], match="not prepared yet")


def test_our_adapter_gives_the_same_logits_in_plain_peft(run, base, tmp_path):
    cdpo("export", run.path, tmp_path / "adapter", check=0)
    plain = plain_peft(base, tmp_path / "adapter")
    policy = load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
    tokens = policy.tokenizer(run.prompts()["prompt"].tolist(), return_tensors="pt")
    with torch.no_grad(), attached_adapter(policy, run.adapter_folder(1)) as ours:
        logits = ours(**tokens).logits
        torch.testing.assert_close(plain(**tokens).logits, logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (policy.model(**tokens).logits - logits).abs().max() > 0.1
