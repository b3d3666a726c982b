"""Which files of a folder are those of a split: one rule.

Hidden files and folders are skipped (`.ipynb_checkpoints`, `.cache`, `__MACOSX`). A split's name
may stand anywhere in a file's name, else in the nearest folder's: `train`, `test` or
`validation`, in their usual spellings, with what follows it (`train_prefs`). Files of two splits
are never read together.
"""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from data_prep.errors import UserError

PATTERNS = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz")

SPELLINGS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
"""How the usual splits are spelt; also with set, data or split behind, as in `testset`."""

_SPLIT_OF = {word: split for split, words in SPELLINGS.items() for word in words}

_WORD = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})"
    r"_?(?:set|data|split)?(?![a-z])",
    re.I,
)

_PIECE = re.compile(r"(_?(part|shard|chunk|piece))?_?\d+$", re.I)
"""The number of a piece of one split: `train_part2`."""


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The parquet and jsonl files of a split, sorted; all of them for `train` where no name says a
    split.

    Raises UserError where there is none, where a name says two splits, and where `split` stands for
    several.
    """
    files = sorted(_below(folder))
    if not files:
        raise UserError(
            f"prompts: {folder}: no such file: a folder without parquet or jsonl files (and not "
            "one of save_to_disk)"
        )
    names = {f: split_name(f.relative_to(folder)) for f in files}
    chosen = [f for f, name in names.items() if name == split.lower()]
    if not chosen and (kind := _SPLIT_OF.get(split.lower())):
        chosen = [f for f, name in names.items() if name and _kind(name) == kind]
        _require_one(folder, split, {names[f] for f in chosen})
    if not chosen and split == "train" and not any(names.values()):
        return files
    chosen = chosen or [f for f in files if _called(f.relative_to(folder), split)]
    if not chosen:
        shown = ", ".join(str(f.relative_to(folder)) for f in files[:5])
        raise UserError(
            f"prompts: {folder}: no file of split {split} in it ({shown}); set split, or give the "
            "file"
        )
    _require_one_kind(folder, split, {_kind(name) for f in chosen if (name := names[f])})
    return chosen


def split_name(path: Path) -> str | None:
    """The split that a relative path names, with what follows it in the name: `train_prefs`; None
    where it names none. Raises UserError for a name with two."""
    for part in (path.name, *reversed(path.parts[:-1])):
        found = list(_WORD.finditer(part))
        kinds = {_SPLIT_OF[match[1].lower()] for match in found}
        if len(kinds) > 1:
            raise UserError(
                f"prompts: {path}: its name says {' and '.join(sorted(kinds))}; rename it, or give "
                "the file itself as the source"
            )
        if found:
            whole = re.match(r"\w+", part[found[0].start() :])
            return _PIECE.sub("", whole[0]).lower() if whole else None
    return None


def _below(folder: Path) -> Iterator[Path]:
    """The files of PATTERNS below a folder that are not hidden; linked folders too, each once and
    rather by its own name than by a link's."""
    read = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in read:
            folders.clear()
            continue
        read.add(real)
        folders[:] = sorted(
            filter(_visible, folders), key=lambda n: (os.path.islink(os.path.join(place, n)), n)
        )
        yield from (
            Path(place, name)
            for name in filter(_visible, names)
            if any(fnmatch(name, pattern) for pattern in PATTERNS)
        )


def _visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _called(path: Path, split: str) -> bool:
    """Whether a file's name begins with a split of another name, or lies in its folder."""
    begins = re.match(rf"{re.escape(split)}(-|\.)", path.name)
    return bool(begins) or (split in path.parts[:-1] and split_name(path) is None)


def _kind(name: str) -> str:
    match = _WORD.search(name)
    return _SPLIT_OF[match[1].lower()] if match else name


def _require_one(folder: Path, split: str, names: Iterable[str | None]) -> None:
    """Several splits of one kind hold different things: UltraFeedback's train_prefs, train_sft."""
    several = sorted(name for name in names if name)
    if len(several) > 1:
        raise UserError(
            f"prompts: {folder}: {split} is {' or '.join(several)} there; give one of them, as in "
            f"{{dataset: {folder}, split: {several[0]}}}"
        )


def _require_one_kind(folder: Path, split: str, kinds: set[str]) -> None:
    if len(kinds) > 1:
        raise UserError(
            f"prompts: {folder}: split {split} holds files of {' and '.join(sorted(kinds))}; give "
            "the file itself as the source"
        )
