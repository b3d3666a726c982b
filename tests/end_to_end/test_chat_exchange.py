"""Chats go to TRL as messages: what its DPO preparation makes of the file that relabel wrote."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.templates import tokenize_prompts
from tests.helpers.cli import cdpo
from tests.helpers.models import save_word_tokenizer, tiny_llama_config

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
CHATS = {
    "p0": [{"role": "user", "content": "w1 w2"}],
    "p1": [
        {"role": "system", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 {w6}"},
        {"role": "user", "content": "w1"},
    ],
}
RELABEL = ["--reward", "r", "--labels", "argmax", "--text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a chat template, and tokens for what a chat's JSON would be made of."""
    folder = tmp_path_factory.mktemp("chat-model")
    words = "<|user|> <|system|> <|assistant|> <|end|> {w6} " + " ".join(f"w{i}" for i in range(9))
    size = save_word_tokenizer(folder, words)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(size)).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run_tables(tmp_path):
    """A chat run's pool and prompts as a run writes them; one answer of p1 was cut off."""
    rows = [("p0", "w3", 1.0, True), ("p0", "w4 w4", 0.0, True)]
    rows += [("p1", "w7", 0.0, True), ("p1", "w8 w8", 1.0, False), ("p1", "w2", 2.0, True)]
    pool = pd.DataFrame(rows, columns=["prompt_id", "response", "r", "ended"])
    pool.insert(1, "response_id", [f"y{i}" for i in range(len(pool))])
    pool.to_parquet(tmp_path / "pool.parquet")
    prompts = pd.DataFrame({"prompt_id": list(CHATS), "prompt": map(json.dumps, CHATS.values())})
    prompts.to_parquet(tmp_path / "prompts.parquet")
    return [tmp_path / "pool.parquet", "--prompts", tmp_path / "prompts.parquet"]


def prepared_by_trl(model, path, cache):
    """The rows that TRL's DPOTrainer tokenizes a file to, by their texts' ids."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))
    settings = DPOConfig(str(cache / "out"), report_to=[], use_cpu=True, bf16=False)
    trainer = DPOTrainer(model=str(model), args=settings, train_dataset=rows)
    return trainer.train_dataset


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_trl_reads_a_chat_as_the_run_does(model, run_tables, tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    said = cdpo("data", "relabel", *run_tables, *RELABEL, "-o", path, check=0).stdout
    assert "2 of 4 pairs hold a response that was cut off" in said and "--drop-cut-off" in said
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = prepared_by_trl(model, path, tmp_path)
    table = pd.read_parquet(run_tables[2])
    own = tokenize_prompts(table, PromptSettings(source="x", format="chat"), tokenizer)
    assert rows["prompt_id"] == ["p0", "p1", "p1", "p1"]
    for row in rows:
        assert row["prompt_ids"] == own[row["prompt_id"]]
    words = [tokenizer.decode(rows[0][f"{side}_ids"]).split() for side in ("chosen", "rejected")]
    # the template's own end of a turn, as the policy writes it
    assert words == [["w3", "<|end|>"], ["w4", "w4", "<|end|>"]]
    assert tokenizer.unk_token_id not in [i for row in rows for i in row["prompt_ids"]]


def test_a_chat_in_its_own_column_is_the_same_in_every_form(model, run_tables, tmp_path):
    pool = pd.read_parquet(run_tables[0])
    asked = pool["prompt_id"].map(CHATS)
    forms = {
        "json": asked.map(json.dumps),
        "python": asked.map(repr),
        "lists": asked,
        "parts": asked.map(
            lambda chat: [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]
        ),
    }
    written = {}
    for form, prompts in forms.items():
        file, output = tmp_path / f"{form}.jsonl", tmp_path / f"{form}-pairs.jsonl"
        pool.assign(prompt=prompts).to_json(file, orient="records", lines=True)
        cdpo("data", "relabel", file, *RELABEL, "-o", output, check=0)
        written[form] = output.read_text()
    pool.assign(prompt=asked).to_parquet(tmp_path / "lists.parquet")
    cdpo("data", "relabel", tmp_path / "lists.parquet", *RELABEL, "-o", output, check=0)
    written["lists in parquet"] = output.read_text()
    rows = [json.loads(line) for line in written["json"].splitlines()]
    assert [row["prompt"] for row in rows] == [CHATS[row["prompt_id"]] for row in rows]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "w3"}]
    assert {*written.values()} == {written["json"]}


def test_answers_that_were_cut_off_can_be_left_out(run_tables, tmp_path):
    path = tmp_path / "pairs.parquet"
    words = ["data", "relabel", *run_tables, *RELABEL, "-o", path, "--drop-cut-off"]
    facts = json.loads(cdpo(*words, "--json", check=0).stdout)
    assert facts["pairs"] == 2 and facts["cut_off_pairs"] == 0
    assert facts["left_out"] == {"single_response": 0, "cut_off": 1, "no_response": 0}
    pairs = pd.read_parquet(path)
    assert "y3" not in {*pairs["chosen_id"], *pairs["rejected_id"]}
    assert "1 responses that were cut off" in cdpo(*words, check=0).stdout


def test_what_is_left_of_a_prompt_is_counted(run_tables, tmp_path):
    pool = pd.read_parquet(run_tables[0]).assign(ended=[True, True, False, False, False])
    pool.to_parquet(run_tables[0])
    words = ["data", "relabel", *run_tables, *RELABEL, "-o", tmp_path / "p.parquet"]
    facts = json.loads(cdpo(*words, "--drop-cut-off", "--json", check=0).stdout)
    assert facts["left_out"] == {"single_response": 0, "cut_off": 3, "no_response": 1}
    pool.assign(ended=np.arange(5) == 0).to_parquet(run_tables[0])
    refusal = cdpo(*words, "--drop-cut-off", check=2).stderr
    assert "4 of 5 were cut off, and no prompt has two that were not" in refusal
    assert not list(tmp_path.glob(".p.parquet*"))


REFUSED = {
    "mixed": (
        lambda pool: pool.assign(prompt=["a", "a", *["[{'role': 'user', 'content': 'b'}]"] * 3]),
        [],
        "p1 is a list of messages, and p0 a text",
    ),
    "neither": (lambda pool: pool.assign(prompt=[[{"role": "user"}]] * 5), [], "p0: a chat prompt"),
    "no ended": (
        lambda pool: pool.drop(columns="ended").assign(prompt="a"),
        ["--drop-cut-off"],
        "no column ended",
    ),
    "no truth value": (
        lambda pool: pool.assign(prompt="a", ended=[1, 0, 1, 1, 1]),
        [],
        "column ended is not true or false in row 0",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_handed_over_is_named(run_tables, tmp_path, refused, kind):
    change, words, match = REFUSED[kind]
    file = tmp_path / "own.jsonl"
    change(pd.read_parquet(run_tables[0])).to_json(file, orient="records", lines=True)
    refused("data", "relabel", file, *RELABEL, *words, "-o", tmp_path / "p.jsonl", match=match)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.json", "pairs.jsonl.gz"])
def test_a_name_that_promises_another_format_is_refused(run_tables, tmp_path, refused, name):
    words = ["data", "relabel", *run_tables, *RELABEL, "-o", tmp_path / name]
    refused(*words, match="name it .parquet or .jsonl")
    assert not (tmp_path / name).exists()
