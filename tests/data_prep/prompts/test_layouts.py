"""Golden rows in the published schemas (tests/data, written by hand): prompts, answers and labels,
to the letter."""

import json

import pytest

from data_prep.prompts.layouts import answers_of, layout_columns, preferred, prompt_of
from tests.helpers.tables import rows_of


def user(*contents: str) -> list[dict[str, str]]:
    """Messages that begin and end with the user."""
    return [
        {"role": "assistant" if i % 2 else "user", "content": text}
        for i, text in enumerate(contents)
    ]


CAT, LOCK = (
    "How do I get a neighbour's cat to leave my garden?",
    "What is the quickest way to a lock without a key?",
)
DIARY = "Can I read my flatmate's diary?"
PRIME, FRENCH = "Name a prime between 10 and 15.", "Translate 'good morning' into French."
KEYS = ("I lost my keys.", "Where did you last have them?", "In the car, I think.")
LAVENDER, WATER = (
    "Plant lavender along the fence; most cats dislike it.",
    "Spray it with cold water until it learns.",
)
HAIRPINS = "Most cheap locks open with two bent hairpins: one turns, one lifts the pins."
# file: per row (prompt as text or None, prompt as messages, answers, {label: preferred})
GOLDEN = {
    "pku_saferlhf_30k": [
        (CAT, user(CAT), [LAVENDER, WATER], {"better_response_id": 0, "safer_response_id": 0}),
        (
            LOCK,
            user(LOCK),
            ["Ring a locksmith.", HAIRPINS],
            {"better_response_id": 1, "safer_response_id": 0},
        ),
    ],
    "pku_saferlhf": [
        (
            DIARY,
            user(DIARY),
            [
                "No, it is private. Ask them instead.",
                "Yes, do it while they are out; they will never know.",
            ],
            {"better_response_id": 0, "safer_response_id": 0},
        ),
        (
            DIARY,
            user(DIARY),
            ["Only the cover.", ""],
            {"better_response_id": 0, "safer_response_id": 1},
        ),
    ],
    "hh_rlhf": [
        (
            "What rhymes with rain?",
            user("What rhymes with rain?"),
            ["Train and plain do.", "Nothing."],
            {"chosen": 0},
        ),
        (
            f"{KEYS[0]}\n\nAssistant: {KEYS[1]}\n\nHuman: {KEYS[2]}",
            user(*KEYS),
            ["Then look under the seats first.", "Buy a new car."],
            {"chosen": 0},
        ),
        ("Is it late?", user("Is it late?"), ["It is nine.", None], {"chosen": 0}),
    ],
    "ultrafeedback_binarized": [
        (PRIME, user(PRIME), ["11 is prime, and so is 13.", "12"], {"chosen": 0}),
        (FRENCH, user(FRENCH), ["Bonjour.", "Bonsoir, perhaps."], {"chosen": 0}),
    ],
    "conversations": [
        (
            None,
            [{"role": "system", "content": "Answer in one word."}, *user("Capital of Peru?")],
            ["Lima."],
            {},
        ),
        ("And of Chile?", user("And of Chile?"), [], {}),
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows(name):
    rows = rows_of(name)
    assert len(rows) == len(GOLDEN[name])
    for row, (text, messages, answers, labels) in zip(rows, GOLDEN[name], strict=True):
        assert json.loads(prompt_of(row, chat=True)) == messages
        assert answers_of(row, chat=True) == answers
        assert {label: preferred(row, label) for label in labels} == labels
        if text is None:
            with pytest.raises(ValueError, match=r"set prompts\.format: chat"):
                prompt_of(row, chat=False)
        else:
            assert prompt_of(row, chat=False) == text
        # the columns that are read suffice, as from a parquet file
        narrow = {column: row[column] for column in layout_columns(row)}
        assert (
            prompt_of(narrow, chat=True) == prompt_of(row, chat=True)
            and answers_of(narrow, chat=True) == answers
        )


def test_hh_as_text_gives_the_published_dialogue_back():
    for row in rows_of("hh_rlhf")[:2]:
        whole = f"\n\nHuman: {prompt_of(row, chat=False)}\n\nAssistant:"
        assert [whole + answer for answer in answers_of(row, chat=False)] == [
            row["chosen"],
            row["rejected"],
        ]


def test_answers_alone_beside_their_prompt():
    row = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    assert (prompt_of(row, chat=False), answers_of(row, chat=False)) == ("hi", ["hello", "go away"])
    lists = {
        "prompt": user("a", "b", "c"),
        "chosen": [{"role": "assistant", "content": "d"}],
        "rejected": user("x", "y"),
    }
    assert json.loads(prompt_of(lists, chat=True)) == user("a", "b", "c")


@pytest.mark.parametrize(
    ("row", "label", "match"),
    [
        (
            {"prompt": "a", "response_0": "x", "response_1": None},
            "better_response_id",
            "`response_1` is None; it must be a text",
        ),
        (
            {"prompt": "a", "response_0": "x", "response_1": "y"},
            "better_response_id",
            "no `better_response_id`",
        ),
        (
            {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": -1},
            "better_response_id",
            "is -1; it must be 0 or 1",
        ),
        (
            {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": True},
            "better_response_id",
            "True; it must be",
        ),
        (
            {"prompt": "a", "response_0": "x", "response_1": "y", "better_response_id": None},
            "better_response_id",
            "None; it must be",
        ),
        ({"prompt": "a", "response_0": "x", "response_1": "y"}, "chosen", "no `chosen`"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": 3}, "chosen", "`rejected` is 3"),
        (
            {"prompt": "a", "chosen": [{"role": "user"}], "rejected": []},
            "chosen",
            "list of {role, content}",
        ),
    ],
)
def test_malformed_answers_and_labels(row, label, match):
    with pytest.raises(ValueError, match=match):
        _ = prompt_of(row, chat=True), answers_of(row, chat=True), preferred(row, label)


def test_labels_of_a_csv_are_digits():
    row = {"prompt": "a", "response_0": "x", "response_1": "y", "safer_response_id": "1"}
    assert preferred(row, "safer_response_id") == 1
