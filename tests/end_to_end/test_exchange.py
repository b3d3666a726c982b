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

from constrained_dpo.run.create import init_run
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy, resolve_model
from data_prep.models.settings import PolicySettings
from data_prep.sampling.logprobs import response_logps
from data_prep.tables import GROUPS, PAIRS, read_parquet
from tests.helpers.cli import cdpo
from tests.helpers.models import save_adapter, save_tiny_causal_lm
from tests.helpers.paths import QUICKSTART, SMALL


@pytest.fixture(scope="module")
def base() -> str:
    return resolve_model(PolicySettings(model="quickstart"))


@pytest.fixture(scope="module")
def texts(run, tmp_path_factory):
    """The run's pool relabelled under a λ, with texts."""
    path = tmp_path_factory.mktemp("texts") / "pairs.parquet"
    arguments = [
        "--reward",
        "helpful",
        "--lambda",
        "harmless=0.5",
        "--pairs-per-prompt",
        2,
        "--text",
    ]
    cdpo(
        "data",
        "relabel",
        run.pool_file(None),
        *arguments,
        "--prompts",
        run.path / "prompts.parquet",
        "-o",
        path,
        check=0,
    )
    return path


@pytest.fixture(scope="module")
def outside(base, texts, tmp_path_factory):
    """A LoRA adapter that plain TRL trained for two steps on those pairs, as its documentation does
    it; and the trainer's log."""
    folder = tmp_path_factory.mktemp("trl")
    rows = datasets.load_dataset(
        "parquet", data_files=str(texts), split="train", cache_dir=str(folder / "cache")
    )
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
        model=base,
        args=settings,
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder / "adapter", trainer.state.log_history


def load(path, folder) -> datasets.Dataset:
    return datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder)
    )


def test_pool_pairs_and_groups_load_in_plain_datasets(run, texts, tmp_path):
    pool, frame = load(run.pool_file(None), tmp_path), read_parquet(run.pool_file(None))
    assert len(pool) == len(frame) and pool[0]["token_ids"] == frame["token_ids"][0].tolist()
    assert (
        pool["response"][:5] == frame["response"][:5].tolist()
        and pool[3]["harmless"] == frame["harmless"][3]
    )
    for path, columns in (
        (run.pairs_file(0), [*PAIRS]),
        (texts, [*PAIRS, "prompt", "chosen", "rejected"]),
    ):
        pairs, frame = load(path, tmp_path), read_parquet(path)
        assert pairs.column_names == columns and pairs.to_pandas().to_dict("list") == frame.to_dict(
            "list"
        )
    arguments = [
        "--reward",
        "helpful",
        "--lambda",
        "harmless=0.5",
        "--group-size",
        4,
        "-o",
        tmp_path / "g.parquet",
    ]
    cdpo("data", "relabel", run.pool_file(None), *arguments, check=0)
    groups = load(tmp_path / "g.parquet", tmp_path)
    assert (
        groups.column_names == [*GROUPS]
        and groups.to_pandas().groupby("group_id").size().eq(4).all()
    )


def test_relabelled_texts_train_in_plain_trl(outside, texts):
    adapter, log = outside
    losses = [row["loss"] for row in log if "loss" in row]
    assert (
        len(losses) == 2 and abs(losses[0] - 0.6931) < 1e-3 and losses[1] != losses[0]
    )  # log 2: the policy starts as the reference
    pairs, prompts = read_parquet(texts), set(read_parquet(texts)["prompt"])
    assert (
        len(pairs) == 2 * len(prompts)
        and pairs["chosen"].ne("").all()
        and (adapter / "adapter_model.safetensors").exists()
    )


def test_an_adapter_of_plain_trl_is_evaluated(run, base, outside):
    adapter, _ = outside
    record = json.loads(
        cdpo(
            "evaluate", run.path, "--adapter", adapter, "--responses", 32, "--json", check=0
        ).stdout
    )
    assert record["key"].startswith("adapter-adapter-test-") and record["adapter"] == str(adapter)
    assert set(record["verdicts"]) == {"harmless"} and record["verdict"] in (
        "satisfied",
        "violated",
        "undecided",
    )
    # It is this adapter that was sampled: the stored log-probabilities are those of plain PEFT
    # on the same base, up to nf4's rounding.
    samples = read_parquet(run.evaluation_folder(record["key"]) / "samples.parquet")
    assert set(samples["prompt_id"]) == set(run.prompts().query("split == 'test'")["prompt_id"])
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    ).eval()
    tokenizer, prompt = (
        AutoTokenizer.from_pretrained(base),
        run.prompts().set_index("prompt_id")["prompt"],
    )
    asked = [tokenizer(prompt[pid])["input_ids"] for pid in samples["prompt_id"]]
    logps, _ = response_logps(
        plain,
        asked,
        [ids.tolist() for ids in samples["token_ids"]],
        pad_id=tokenizer.pad_token_id,
        batch_size=64,
    )
    change = (samples["policy_logp"] - samples["ref_logp"]).abs().mean()
    assert change > 0.05 and abs(logps - samples["policy_logp"]).mean() < 0.5 * change
    assert record["kl"] == pytest.approx(
        (samples["policy_logp"] - samples["ref_logp"]).groupby(samples["prompt_id"]).mean().mean()
    )
    again = cdpo("evaluate", run.path, "--adapter", adapter, "--responses", 32, check=0).stdout
    assert "verdict" in again and record["key"] in again


def test_a_changed_adapter_is_evaluated_anew(run, outside, tmp_path):
    shutil.copytree(outside[0], tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": 64})
    )
    keys = [
        json.loads(
            cdpo(
                "evaluate", run.path, "--adapter", folder, "--responses", 2, "--json", check=0
            ).stdout
        )["key"]
        for folder in (outside[0], tmp_path / "adapter")
    ]
    assert keys[0] != keys[1]


def test_adapters_that_are_not_of_the_base_are_refused(run, base, outside, tmp_path, refused):
    adapter, _ = outside

    def changed(name, **config):
        shutil.copytree(adapter, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp_path / name

    other = save_tiny_causal_lm(tmp_path / "base")
    foreign = save_adapter(other, tmp_path / "foreign")
    evaluate = ("evaluate", run.path, "--adapter")
    assert f"not on {base}" in refused(
        *evaluate, foreign, match=f"--adapter: {foreign} was trained on {other}"
    )
    refused(
        *evaluate,
        changed("moved", base_model_name_or_path="somebody/else"),
        match="was trained on somebody/else",
    )
    refused(*evaluate, changed("prompt", peft_type="PROMPT_TUNING"), match="only LORA is supported")
    refused(
        *evaluate,
        changed("rank", r=8),
        match="of another base, or damaged?) cannot be loaded (size mismatch",
    )
    refused(*evaluate, changed("layers", target_modules=["q_proj"]), match="does not fit")
    # Another base that says nothing of itself: the shapes do.
    config = json.loads((foreign / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": None
    }
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    refused(*evaluate, foreign, match="size mismatch")
    refused(*evaluate, tmp_path / "nowhere", match="is not a folder")
    refused(*evaluate, adapter, "--round", "0", match="give one of them")
    unprepared = init_run(QUICKSTART, tmp_path / "run", list(SMALL))
    refused("evaluate", unprepared.path, "--adapter", adapter, match="not prepared yet")


def test_our_adapter_gives_the_same_logits_in_plain_peft(run, base, tmp_path):
    cdpo("export", run.path, tmp_path / "adapter", check=0)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter")
    ).eval()
    policy = load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
    tokens = policy.tokenizer(run.prompts()["prompt"].tolist(), return_tensors="pt")
    with torch.no_grad(), attached_adapter(policy, run.adapter_folder(1)) as ours:
        logits = ours(**tokens).logits
        torch.testing.assert_close(plain(**tokens).logits, logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (policy.model(**tokens).logits - logits).abs().max() > 0.1
