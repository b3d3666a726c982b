"""A chat template that asks for the time is told the same one always, in whatever way it asks."""

import pytest
from transformers import AutoTokenizer

from data_prep.prompts.templates import TEMPLATE_CLOCK, write_chat
from tests.helpers.models import save_word_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASKED = {
    "Llama": (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{% endif %}"
        "{{- day }}",
        "%d %b %Y",
    ),
    "gpt-oss": (
        '{%- macro system() -%}{{- strftime_now("%Y-%m-%d") }}{%- endmacro -%}{{- system() }}',
        "%Y-%m-%d",
    ),
    "a format by name": ("{%- set f = '%B %-d, %A' %}{{- strftime_now(format=f) }}", "%B %-d, %A"),
    "its parts": (
        "{%- set day = strftime_now('%Y-%m-%d').split('-') %}{{- day[2] ~ '%' ~ day[0] }}",
        "%d%%%Y",
    ),
    "to the microsecond": ("{{- strftime_now('%H:%M:%S.%f') }}", "%H:%M:%S.%f"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder, "a b")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("named", [False, True])
def test_the_time_is_one_day_however_it_is_asked(way, named, tokenizer):
    template, format = ASKED[way]
    template += "{%- for m in messages %} {{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = {"default": template, "rag": "x"} if named else template
    written = write_chat(tokenizer, CHAT, add_generation_prompt=False)
    assert written == f"{TEMPLATE_CLOCK.strftime(format)} a b"


@pytest.mark.parametrize(
    "start", ["", " ", "\n", " \n ", "  {% if true %}\n  x{% endif %}\n", "{#- -#} "]
)
def test_white_space_stays_as_it_is(start, tokenizer):
    """A template that could ask for the time but does not, as transformers alone writes it."""
    tokenizer.chat_template = start + "y{% if false %}{{ strftime_now('%d') }}{% endif %}\n"
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert write_chat(tokenizer, CHAT, add_generation_prompt=False) == expected


def test_other_templates_are_written_as_they_are(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% if add_generation_prompt %} strf{% endif %}\n"
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert write_chat(tokenizer, CHAT, add_generation_prompt=prompt) == expected
