"""The everyday questions: as many as promised, none in both splits; their scorers."""

import pytest

from data_prep.errors import UserError
from data_prep.everyday import question_rows
from data_prep.everyday.scorers import brief, compact, friendly, warm


def test_two_hundred_questions_to_fit_on_and_sixty_others_for_the_test():
    texts = {}
    for split in ("train", "test"):
        rows = [(row.content or {})["prompt"] for row in question_rows(split)]
        assert all([turn["role"] for turn in row] == ["system", "user"] for row in rows)
        texts[split] = {row[1]["content"] for row in rows}
    assert (len(texts["train"]), len(texts["test"])) == (200, 60)
    assert not texts["train"] & texts["test"]
    with pytest.raises(UserError, match="no split dev"):
        question_rows("dev")


def test_warm_answers_are_friendly_and_long_ones_are_not_brief():
    pytest.importorskip("vaderSentiment")
    warm, plain, cold = friendly(["q"] * 3, ["I'd love to help!", "Boil it.", "That is bad."])
    assert 1 >= warm > plain == 0 > cold >= -1
    assert brief(["q"] * 2, ["one two three", ""]) == [-0.3, 0.0]


def test_second_opinions_agree_on_what_is_clear():
    pytest.importorskip("textblob")
    good, plain, bad = warm(["q"] * 3, ["What a great idea!", "Boil the egg.", "That is awful."])
    assert 1 >= good > plain == 0 > bad >= -1
    assert compact(["q"] * 3, ["x" * 50, "", "x" * 900]) == [-0.5, 0.0, -5.0]
