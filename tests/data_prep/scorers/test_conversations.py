"""What each scorer is told of a chat of several turns: all of it, or its last user text."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from data_prep.errors import UserError
from data_prep.scorers.http import HttpScorer
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.scoring import make_scorer
from data_prep.scorers.settings import HttpScorerSettings
from tests.helpers.cli import cdpo
from tests.helpers.models import save_classifier

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one city"},
    {"role": "assistant", "content": "paris"},
    {"role": "user", "content": "and then"},
]
WORDS = "be brief one city paris and then rome System: User: Assistant: system user assistant"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifier"), WORDS)


def classifier(folder, text, **keys):
    settings = {"type": "classifier", "model": str(folder), "text": text}
    return make_scorer(ClassifierScorerSettings.model_validate(settings | keys))


@pytest.fixture
def with_template(folder):
    """Gives the classifier's tokenizer a chat template, and takes it off again."""
    from transformers import AutoTokenizer

    def save(template):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)

    yield save
    save(None)


def read(scorer):
    """The words that a scorer's model reads of the chat and the answer rome."""
    (prompt,) = scorer.told([CHAT])
    assert np.isfinite(scorer.score([prompt], ["rome"])).all()
    return scorer.tokenizer.decode(scorer._encode(prompt, "rome")["input_ids"])


def test_a_chat_template_reads_every_message(folder, with_template):
    with_template(TEMPLATE)
    scorer = classifier(folder, "chat")
    whole = "system be brief user one city assistant paris user and then assistant rome"
    assert read(scorer).strip() == whole
    (alone,) = scorer.told([CHAT[1:2]])
    assert alone == "one city"  # a single turn is scored, and cached, as its text


def test_a_template_reads_the_conversation_and_a_pair_the_last_turn(folder):
    scorer = classifier(folder, "template", template="{prompt} Assistant: {response}")
    whole = "System: be brief User: one city Assistant: paris User: and then Assistant: rome"
    assert read(scorer).removeprefix("<s>").strip() == whole
    pair = classifier(folder, "pair")
    assert pair.told([CHAT]) == ["and then"]


def test_a_template_that_writes_the_date_reads_the_same_on_every_day(folder, with_template):
    """The real time has microseconds: it is 000000 of them only where the clock is set."""
    with_template("{{ 'one' if strftime_now('%f') == '000000' else 'city' }} " + TEMPLATE)
    assert read(classifier(folder, "chat")).split()[0] == "one"


def test_several_named_templates_without_a_default_are_refused(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)  # of another test
    (model / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text("x")
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\) and none"):
        classifier(model, "chat")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert "rome" in read(classifier(model, "chat"))


def test_a_template_that_refuses_a_message_is_a_line(folder, with_template):
    with_template(NO_SYSTEM + TEMPLATE)
    scorer = classifier(folder, "chat")
    with pytest.raises(UserError, match=r"refuses messages of system, user, .*no system") as error:
        read(scorer)
    assert len(str(error.value).splitlines()) == 1


def test_a_server_is_told_the_conversation_where_a_template_is_filled():
    base = {"type": "http", "url": "http://localhost:1", "version": "1"}
    keys = {"format": "classify", "template": "{prompt}|{response}"}
    classify = HttpScorer(HttpScorerSettings.model_validate(base | keys))
    (text,) = classify._body(classify.told([CHAT]), ["rome"])["input"]
    assert text.startswith("System: be brief\n\nUser: one city") and text.endswith("then|rome")
    plain = HttpScorer(HttpScorerSettings.model_validate(base))
    assert plain._body(plain.told([CHAT]), ["rome"])["prompts"] == ["and then"]


SEEN = "def f(prompts, responses): return [float(len(p)) for p in prompts]\n"


@pytest.mark.parametrize("form", ["list.jsonl", "text.jsonl", "repr.csv", "list.parquet"])
def test_a_table_of_chats_is_scored_by_its_last_user_text(form, tmp_path):
    prompts = [CHAT, CHAT[1:2]]
    written = {"list": lambda p: p, "text": json.dumps, "repr": str}[form.split(".")[0]]
    frame = pd.DataFrame({"prompt": [*map(written, prompts)], "response": ["007", "NA"]})
    if form.endswith("csv"):
        frame.to_csv(tmp_path / form, index=False)
    elif form.endswith("parquet"):
        frame.to_parquet(tmp_path / form)
    else:
        frame.to_json(tmp_path / form, orient="records", lines=True)
    (tmp_path / "s.py").write_text(SEEN)
    scorer = json.dumps({"type": "python", "target": f"{tmp_path / 's.py'}:f"})
    how = ("--name", "s", "--scorer", scorer)
    cdpo("data", "score", tmp_path / form, "-o", tmp_path / "o.parquet", *how, check=0)
    table = pd.read_parquet(tmp_path / "o.parquet")
    assert table["s"].tolist() == [float(len("and then")), float(len("one city"))]
    assert [json.loads(prompt) for prompt in table["prompt"]] == prompts
    again = ("data", "score", tmp_path / "o.parquet", "-o", tmp_path / "p.parquet")
    cdpo(*again, "--name", "t", *how[2:], check=0)
    assert pd.read_parquet(tmp_path / "p.parquet")["t"].equals(table["s"].rename("t"))


BAD = {
    "a null response": ({"prompt": "b", "response": None}, "line 2: response is null"),
    "a number as response": ({"prompt": "b", "response": 5}, "line 2: response is 5, not a text"),
    "no response": ({"prompt": "b"}, "line 2: response is null"),
    "a null prompt": ({"prompt": None, "response": "x"}, "row 2: a chat prompt is a list"),
    "an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "response": "x"},
        "row 2: message 1 holds a part of type image",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_without_texts_is_named(kind, refused, tmp_path):
    row, match = BAD[kind]
    lines = [json.dumps(r) for r in ({"prompt": "a", "response": "x"}, row)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "s.py").write_text(SEEN)
    scorer = json.dumps({"type": "python", "target": f"{tmp_path / 's.py'}:f"})
    arguments = ("data", "score", tmp_path / "t.jsonl", "-o", tmp_path / "o.parquet")
    refused(*arguments, "--name", "s", "--scorer", scorer, match=match)
