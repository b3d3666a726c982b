"""Which files of a folder are read: never hidden ones, never train and test together."""

import json

import pytest

from data_prep.errors import UserError
from data_prep.prompts.rows import DatasetSource
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.split import read_prompts


def filled(folder, *names):
    """Writes files whose one prompt is their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"prompt": name}) + "\n")
    return folder


def files_read(folder, split="train"):
    return set(read_prompts(DatasetSource(dataset=str(folder), split=split), "text")[0])


UF = ("data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl")
CASES = {
    # kind: files, split, what is read
    "one train split": (UF, "train", {UF[0]}),
    "a split by its whole name": ((*UF, "data/train_sft.jsonl"), "train_prefs", {UF[0]}),
    "its test split": ((*UF, "data/test_sft.jsonl"), "test_prefs", {UF[1]}),
    "the name at the end": (("hh_train.jsonl", "hh_test.jsonl"), "train", {"hh_train.jsonl"}),
    "in the middle": (
        ("hh-train-0.jsonl", "hh-train-1.jsonl", "hh-dev-0.jsonl"),
        "train",
        {"hh-train-0.jsonl", "hh-train-1.jsonl"},
    ),
    "pieces": (
        ("train_part1.jsonl", "train_part2.jsonl", "test.jsonl"),
        "train",
        {"train_part1.jsonl", "train_part2.jsonl"},
    ),
    "capitals": (("Train.jsonl", "TEST.jsonl"), "train", {"Train.jsonl"}),
    "one word": (("trainset.jsonl", "testset.jsonl"), "train", {"trainset.jsonl"}),
    "another spelling": (("train.jsonl", "dev.jsonl"), "validation", {"dev.jsonl"}),
    "by folder": (("train/a.jsonl", "test/a.jsonl"), "train", {"train/a.jsonl"}),
    "the nearest folder": (("train/a.jsonl", "train/test/b.jsonl"), "train", {"train/a.jsonl"}),
    "a name inside words": (
        ("latest.jsonl", "strain.jsonl"),
        "train",
        {"latest.jsonl", "strain.jsonl"},
    ),
    "another split's name": (("safe-0.jsonl", "rude-0.jsonl"), "safe", {"safe-0.jsonl"}),
    "ndjson": (("train.ndjson", "test.ndjson"), "train", {"train.ndjson"}),
    "notebooks": (("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"), "train", {"a.jsonl"}),
    "caches": (("a.jsonl", ".cache/x/a.jsonl", "__MACOSX/a.jsonl"), "train", {"a.jsonl"}),
    "hidden files": (("a.jsonl", "._a.jsonl", ".a.jsonl"), "train", {"a.jsonl"}),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_files_of_a_split(kind, tmp_path):
    names, split, expected = CASES[kind]
    # what stands above the folder says nothing
    folder = filled(tmp_path / ".hidden" / "test", *names)
    assert files_read(folder, split) == expected


REFUSED = {
    "several train splits": (
        ("train_sft.jsonl", "train_prefs.jsonl", "test_sft.jsonl"),
        "train",
        "train is train_prefs or train_sft there",
    ),
    "a name of two splits": (("train_and_test.jsonl",), "train", "its name says test and train"),
    "test alone": (("my_test.jsonl",), "train", r"no file of split train in it \(my_test.jsonl\)"),
    "no such split": (("a.jsonl", "b.jsonl"), "test", "no file of split test"),
    "one split's folder with both": (("safe-train.jsonl", "safe-test.jsonl"), "safe", "and train"),
    "hidden files alone": ((".a.jsonl",), "train", "no such file: a folder without"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_leaves_it_open_is_refused(kind, tmp_path):
    names, split, match = REFUSED[kind]
    with pytest.raises(UserError, match=match) as error:
        files_read(filled(tmp_path, *names), split)
    assert len(str(error.value).splitlines()) == 1


def test_linked_folders_are_read_once_and_rather_by_their_own_name(tmp_path):
    far = filled(tmp_path / "far", "a.jsonl", "b/c.jsonl", ".d.jsonl")
    folder = filled(tmp_path / "here", "train.jsonl", "test/e.jsonl", ".hidden/f.jsonl")
    (folder / "more-train").symlink_to(far)
    (folder / "more-train-again").symlink_to(far)
    (folder / "again-test").symlink_to(folder / "test")
    (far / "b" / "round").symlink_to(far)
    (folder / "round").symlink_to(folder)
    assert files_read(folder) == {"train.jsonl", "a.jsonl", "b/c.jsonl"}
    assert files_read(folder, "test") == {"test/e.jsonl"}


def test_a_link_to_nothing_is_named(tmp_path):
    folder = filled(tmp_path / "here", "a.jsonl")
    (folder / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be read .*No such file"):
        files_read(folder)


@pytest.mark.parametrize("through", ["file", "folder", "two links"])
def test_a_link_keeps_its_own_ending(through, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    snapshot.mkdir()
    filled(blobs, "3f9a0c")
    link = snapshot / "prompts.jsonl"
    link.symlink_to(blobs / "3f9a0c")
    if through == "folder":
        (tmp_path / "main").symlink_to(snapshot)
    if through == "two links":
        (snapshot / "again.jsonl").symlink_to(link)
    name = {"file": "snapshot/prompts.jsonl", "folder": "main/prompts.jsonl"}.get(
        through, "snapshot/again.jsonl"
    )
    settings = PromptSettings.model_validate({"source": name}, context={"folders": [tmp_path]})
    assert settings.source.endswith(".jsonl")
    assert read_prompts(settings.source, "text")[0].tolist() == ["3f9a0c"]
