"""Lines of a recipe: a key, its value, and why it was chosen."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ruamel.yaml.error import YAMLError

from data_prep.settings import parse_yaml

COLUMN, WIDTH = 36, 100
"""Where comments begin, and the longest line."""

_PLAIN = re.compile(r"[A-Za-z0-9_./~+-]+")


@dataclass(frozen=True)
class Line:
    """A line of YAML without its indent, and its comment."""

    depth: int
    text: str
    why: str = ""

    def written(self) -> str:
        """The line; a comment that does not fit behind it stands above."""
        indent = "  " * self.depth
        line = f"{indent}{self.text}"
        if not self.why:
            return line
        behind = f"{line:<{COLUMN}}  # {self.why}"
        if len(behind) <= WIDTH:
            return behind
        return f"{indent}# {self.why}\n{line}"


def shown(value: object) -> str:
    """A value as YAML reads it back, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if isinstance(value, str) and not _reads_as_itself(text):
        return json.dumps(text, ensure_ascii=False)
    return text.lower() if isinstance(value, bool) else text


def _reads_as_itself(text: str) -> bool:
    if not _PLAIN.fullmatch(text):
        return False
    try:
        return parse_yaml(text) == text
    except YAMLError:
        return False
