"""Readers, the split, templates and BOS."""

import gzip
import json

import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.prompts.layouts import parse_hh
from data_prep.prompts.messages import last_user_text
from data_prep.prompts.rows import DatasetSource
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import read_prompts, split_prompts
from data_prep.prompts.templates import tokenize_prompts
from tests.helpers.paths import REAL


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as handle:
        handle.write("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_every_file_kind_gives_the_same_prompts(tmp_path):
    rows = [{"prompt": f"question {i}"} for i in range(9)]
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "p.parquet")
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_csv(tmp_path / "p.tsv", index=False, sep="\t")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "p.jsonl", rows)
    write_jsonl(tmp_path / "p.jsonl.gz", rows)
    (tmp_path / "p.txt").write_text("".join(f"question {i}\n" for i in range(9)) + "\n")
    with gzip.open(
        tmp_path / "q.csv.gz", "wt", encoding="utf-8-sig"
    ) as handle:  # as spreadsheets write it
        handle.write("prompt\r\n" + "".join(f'"question {i}"\r\n' for i in range(9)))
    tables = [read_prompts(str(f), "text")[0] for f in sorted(tmp_path.iterdir())]
    assert len(tables) == 8 and all(table.equals(tables[0]) for table in tables)
    assert set(tables[0]) == {row["prompt"] for row in rows}


def test_folders_of_files_and_of_save_to_disk_are_sources(tmp_path):
    import datasets

    rows = {
        split: [{"prompt": f"{split} {i}", "more": i} for i in range(3)]
        for split in ("train", "test")
    }
    files, saved, single = tmp_path / "files", tmp_path / "saved", tmp_path / "single"
    (files / "data").mkdir(parents=True)
    pd.DataFrame(rows["train"][:2]).to_parquet(files / "data" / "train-00000-of-00002.parquet")
    pd.DataFrame(rows["train"][2:]).to_parquet(files / "data" / "train-00001-of-00002.parquet")
    write_jsonl(files / "data" / "test.jsonl", rows["test"])
    splits = {split: datasets.Dataset.from_list(given) for split, given in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(saved)
    splits["train"].save_to_disk(single)
    for folder in (files, saved, single):
        assert set(read_prompts(str(folder), "text")[0]) == {"train 0", "train 1", "train 2"}
    for folder in (files, saved):
        assert set(read_prompts(DatasetSource(dataset=str(folder), split="test"), "text")[0]) == {
            "test 0",
            "test 1",
            "test 2",
        }
        with pytest.raises(UserError, match=r"no (file of )?split dev"):
            read_prompts(DatasetSource(dataset=str(folder), split="dev"), "text")
    write_jsonl(files / "data" / "train-2.jsonl", [{"prompt": ""}])
    with pytest.raises(UserError, match=r"data/train-2\.jsonl line 1: the prompt is empty"):
        read_prompts(str(files), "text")
    with pytest.raises(UserError, match="revision is of hub datasets"):
        read_prompts(DatasetSource(dataset=str(saved), revision="main"), "text")


def test_malformed_lines_are_listed_by_number_and_counted(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"prompt": \n[1]\n{"prompt": 3}\n{"prompt": ""}\n{"x": 1}\n{"prompt": '
        '"b"}\n'
    )
    with pytest.raises(UserError) as error:
        read_prompts(str(path), "text")
    assert str(error.value) == (
        f"{path}: line 3: not valid JSON (Expecting value at character 11); line 4: not a JSON "
        "object; line 5: a chat prompt is a list of "
        "{role, content} messages, a text prompt a string (and 2 more rows); mend or remove them"
    )
    (tmp_path / "p.csv").write_text('prompt,x\n"two\nlines",1\na,b,c\n')
    with pytest.raises(UserError, match="line 4: more cells than the header"):
        read_prompts(str(tmp_path / "p.csv"), "text")


def test_split_is_by_hash_disjoint_and_stable(tmp_path):
    rows = [{"prompt": f"question {i % 400}"} for i in range(500)]
    settings = PromptSettings(source=write_jsonl(tmp_path / "p.jsonl", rows), test=0.25)
    table, left_out = split_prompts(settings, 60)
    assert left_out == {"duplicates": 100, "in_test": 0, "over_max": 0}
    counts = table["split"].value_counts()
    assert counts["dual"] == 60 and 70 < counts["test"] < 130 and counts.sum() == 400
    more, _ = split_prompts(
        PromptSettings(
            source=write_jsonl(tmp_path / "q.jsonl", [*rows[::-1], {"prompt": "new"}]), test=0.25
        ),
        60,
    )
    merged = table.merge(more, on="prompt_id")
    assert (merged["split_x"].eq("test") == merged["split_y"].eq("test")).all()


def test_a_test_file_takes_its_prompts_out_of_fit(tmp_path):
    source = write_jsonl(tmp_path / "fit.jsonl", [{"prompt": f"q{i}"} for i in range(20)])
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"q{i}"} for i in range(15, 25)])
    table, left_out = split_prompts(
        PromptSettings(source=source, test=test, max_fit=12, max_test=8), 6
    )
    assert left_out == {"duplicates": 0, "in_test": 5, "over_max": 5}
    assert table["split"].value_counts().to_dict() == {"test": 8, "dual": 6, "fit": 6}


def test_hh_rows_become_chat_messages():
    text = (
        "\n\nHuman: hi there\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant: fine: thanks"
    )
    assert parse_hh(text) == [
        {"role": "user", "content": "hi there"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how are you?"},
        {"role": "assistant", "content": "fine: thanks"},
    ]


def test_hh_files_give_the_dialogue_before_the_last_answer(tmp_path):
    rows = [
        {
            "chosen": f"\n\nHuman: q{i}\n\nAssistant: a\n\nHuman: and?\n\nAssistant: no",
            "rejected": "x",
        }
        for i in range(3)
    ]
    prompts, _ = read_prompts(write_jsonl(tmp_path / "hh.jsonl.gz", rows), "chat")
    first = json.loads(prompts.iloc[0])
    assert [m["role"] for m in first] == ["user", "assistant", "user"]
    assert first[-1]["content"] == "and?" == last_user_text(prompts.iloc[0], "chat")
    # As text, HH's own template gives the published dialogue back.
    texts, _ = read_prompts(tmp_path / "hh.jsonl.gz", "text")
    template = "\n\nHuman: {prompt}\n\nAssistant:"
    assert {template.replace("{prompt}", t) + " no" for t in texts} == {
        row["chosen"] for row in rows
    }


def test_pku_saferlhf_rows_give_their_prompt(tmp_path):
    row = {
        "prompt": "How do I?",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": True,
        "better_response_id": 0,
        "safer_response_id": 0,
    }
    rows = [row, row | {"response_0": "c"}]
    prompts, duplicates = read_prompts(write_jsonl(tmp_path / "pku.jsonl", rows), "text")
    assert prompts.tolist() == ["How do I?"] and duplicates == 1


@pytest.mark.parametrize(
    ("rows", "format", "match"),
    [
        ([{"prompt": "ok"}, {"question": "x"}], "text", "line 2: no `prompt`"),
        ([{"prompt": ""}], "text", "line 1: the prompt is empty"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], "text", "set prompts.format: chat"),
        ([{"prompt": [{"role": "user"}]}], "chat", "list of {role, content}"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "chat", "ends with the user"),
        ([{"chosen": "no turns", "rejected": "x"}], "chat", "not a dialogue"),
        ([{"prompt": None}], "text", "line 1"),
        ([], "text", "no prompts in it"),
    ],
)
def test_malformed_rows_are_listed(tmp_path, rows, format, match):
    with pytest.raises(UserError, match=match):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", rows), format)


def test_too_few_prompts_and_bad_fractions(tmp_path):
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError, match="both need at least 2"):
        split_prompts(PromptSettings(source=source), 1)
    with pytest.raises(UserError, match="neither a source nor a fraction"):
        split_prompts(PromptSettings(source=source, test=1.5), 1)
    with pytest.raises(UserError, match="no such file"):
        split_prompts(PromptSettings(source=str(tmp_path / "none.jsonl")), 1)


def tokenizer_with_bos(chat_template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        w: i for i, w in enumerate(["<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "hello", "you"])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


@pytest.mark.parametrize("template", ["USER: {prompt} ASSISTANT:", "<s> USER: {prompt} ASSISTANT:"])
def test_templates_give_exactly_one_bos(template):
    table = pd.DataFrame({"prompt_id": ["a"], "prompt": ["hello"]})
    ids = tokenize_prompts(
        table, PromptSettings(source="x", template=template), tokenizer_with_bos()
    )["a"]
    assert ids == [0, 3, 5, 4]


def test_chat_templates_and_their_absence():
    table = pd.DataFrame(
        {"prompt_id": ["a"], "prompt": [json.dumps([{"role": "user", "content": "hello"}])]}
    )
    settings = PromptSettings(source="x", format="chat")
    template = (
        "<s> {% for m in messages %}USER: {{ m['content'] }} {% endfor %}{% if "
        "add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert tokenize_prompts(table, settings, tokenizer_with_bos(template))["a"] == [0, 3, 5, 4]
    with pytest.raises(UserError, match="no chat template"):
        tokenize_prompts(table, settings, tokenizer_with_bos())
    with pytest.raises(UserError, match=r"does not contain \{prompt\}"):
        tokenize_prompts(table, PromptSettings(source="x", template="hello"), tokenizer_with_bos())


def test_a_chat_template_may_not_double_bos_or_close_the_prompt():
    settings = PromptSettings(source="x", format="chat")

    def ids(template: str, *messages: str) -> list[int]:
        chat = [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(messages)
        ]
        table = pd.DataFrame({"prompt_id": ["a"], "prompt": [json.dumps(chat)]})
        return tokenize_prompts(table, settings, tokenizer_with_bos(template))["a"]

    turns = (
        "{% for m in messages %}{{ '<s> USER: ' if m['role'] == 'user' else 'ASSISTANT: ' "
        "}}{{ m['content'] }} {% endfor %}"
    )
    # A BOS per turn is the template's business.
    assert ids(turns + "ASSISTANT:", "hello", "you", "you") == [0, 3, 5, 4, 6, 0, 3, 6, 4]
    with pytest.raises(UserError, match="starts with two BOS tokens"):
        ids("<s> " + turns, "hello")
    closed = r"ends with EOS \(</s>\) under the tokenizer's chat template"
    with pytest.raises(UserError, match=closed):
        ids(turns + "</s>", "hello")
    with pytest.raises(UserError, match=r"refuses a prompt \(no system message\)"):
        ids("{{ raise_exception('no system message') }}", "hello")


def test_prompts_that_bring_their_bos_and_others_have_one_each():
    table = pd.DataFrame({"prompt_id": ["a", "b", "c"], "prompt": ["hello", "<s> you", "you"]})
    assert tokenize_prompts(table, PromptSettings(source="x"), tokenizer_with_bos()) == {
        "a": [0, 5],
        "b": [0, 6],
        "c": [0, 6],
    }


@pytest.mark.skipif(not REAL.exists(), reason="needs the real-text test bed")
def test_real_hh_file_is_read():
    prompts, duplicates = read_prompts(str(REAL / "hh_harmless_test.jsonl.gz"), "chat")
    assert len(prompts) + duplicates == 2312
    assert all(json.loads(p)[-1]["role"] == "user" for p in prompts)
