"""Prompts' token ids are those of `prepare`, whatever the chat template writes later."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import AutoTokenizer

from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.prepare import _keep_prompts, _take_kept_tokens
from data_prep.errors import UserError
from data_prep.prompts.settings import PromptSettings
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.tables import TOKEN_IDS
from tests.helpers.models import save_word_tokenizer


def keep(run, learner) -> None:
    _keep_prompts(run, learner.recipe, learner)


@pytest.fixture
def make_learner(tmp_path):
    """A learner whose template writes the day before every prompt, and no model."""
    save_word_tokenizer(tmp_path, "monday tuesday a b c")

    def learner(day, prompts, categories=()):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.chat_template = f"<s>{day} {{{{ messages[0]['content'] }}}}"
        made = LoraLearner(
            SimpleNamespace(
                scorers={},
                prompts=PromptSettings(source="x", format="chat"),
                category_columns=categories,
            ),
            prompts,
        )
        made.__dict__["policy"] = SimpleNamespace(tokenizer=tokenizer)
        return made

    return learner


def table(words="a b c"):
    texts = [json.dumps([{"role": "user", "content": word}]) for word in words.split()]
    ids = [str(i) for i in range(len(texts))]
    return pd.DataFrame({"prompt_id": ids, "prompt": texts, "split": ["fit", "dual", "test"]})


def test_a_template_with_a_date_changes_no_prompt_of_a_run(make_learner, tmp_path):
    run = SimpleNamespace(prompts_file=tmp_path / "prompts.parquet")
    monday, tuesday = (make_learner(day, table()) for day in ("monday", "tuesday"))
    expected = monday.prompt_tokens
    assert expected != tuesday.prompt_tokens
    keep(run, monday)
    kept = read_parquet(run.prompts_file)
    # another command, and a preparation that was killed and goes on the day after
    assert make_learner("tuesday", kept).prompt_tokens == expected
    keep(run, tuesday)
    _take_kept_tokens(run, tuesday)
    assert tuesday.prompt_tokens == expected and TOKEN_IDS in tuesday.prompts
    with pytest.raises(UserError, match="the prompt source changed"):
        keep(run, make_learner("monday", table("a b b")))


def test_prompts_that_no_run_keeps_are_those_of_every_day_too(make_learner):
    """A gate's or an evaluation's file, drawn today and tomorrow; the real time has
    microseconds."""
    clock = "{{ 'monday' if strftime_now('%f') == '000000' else 'tuesday' }}"
    expected = make_learner("monday", table()).prompt_tokens
    assert make_learner(clock, table()).prompt_tokens == expected
    llama = "{% if strftime_now is defined %}" + clock + "{% else %}tuesday{% endif %}"
    assert make_learner(llama, table()).prompt_tokens == expected
    assert make_learner("tuesday", table()).prompt_tokens != expected


def test_a_run_that_kept_prompts_alone_is_read_as_before(make_learner, tmp_path):
    run = SimpleNamespace(prompts_file=tmp_path / "prompts.parquet")
    write_parquet(table(), run.prompts_file)
    older = make_learner("monday", read_parquet(run.prompts_file))
    assert older.prompt_tokens["0"] == [1, 4, 6]
    keep(run, older)  # taken over from another run, before it is prepared
    assert TOKEN_IDS in read_parquet(run.prompts_file)


def test_a_run_takes_over_prompts_with_other_categories(make_learner, tmp_path):
    run = SimpleNamespace(prompts_file=tmp_path / "prompts.parquet")
    keep(run, make_learner("monday", table()))
    with_kind = table().assign(kind=[["x"], [], ["x", "y"]])
    again = make_learner("tuesday", with_kind, ["kind"])
    keep(run, again)
    _take_kept_tokens(run, again)
    assert [list(kinds) for kinds in again.prompts["kind"]] == [["x"], [], ["x", "y"]]
    assert again.prompt_tokens == make_learner("monday", table()).prompt_tokens
    keep(run, make_learner("monday", table()))  # and back
    with pytest.raises(UserError, match="the prompt source changed"):
        keep(run, make_learner("monday", with_kind.assign(kind=[["z"]] * 3), ["kind"]))
