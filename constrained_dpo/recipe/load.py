"""From a YAML file and -s overrides to a validated recipe, and back to a file that keeps the user's
comments. All errors are shown at once.

YAML is version 1.2: `yes` is a word and 5e-4 a number.
"""

import difflib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.scorers.settings import SCORER_TYPES
from data_prep.settings import Settings, parse_yaml, plain, yaml_problem

ALIASES = {"prompts": {"train": "source", "eval": "test"}}
"""Keys that are accepted under a second name, by block."""

Block = TypeVar("Block", bound=Settings)

RecipeSource = Path | str | Mapping[str, Any] | Recipe
"""A recipe's file, its content as a mapping, or a recipe."""


def load_recipe(source: RecipeSource, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe; relative paths in it become absolute.

    overrides: KEY=VALUE with dotted keys, VALUE in YAML. Raises UserError with every error, one per
    line.
    """
    return validated(source, read_document(source, overrides))


def validated(source: RecipeSource, document: CommentedMap) -> Recipe:
    """Validate a document read by `read_document`; source: for messages and relative paths.

    Raises UserError with every error, one per line.
    """
    return _validated(Recipe, source, document)


def load_settings(block: type[Block], source: Path | str | Mapping[str, Any], what: str) -> Block:
    """Read another settings file by the recipe's rules: strict keys, all errors at once, paths
    relative to the file.

    source: the file, or its content; what: names its kind in messages. Raises UserError with every
    error, one per line.
    """
    if isinstance(source, Mapping):
        return _validated(block, source, CommentedMap(source))
    document = _read_file(Path(source), what)
    return _validated(block, source, document)


def _validated(block: type[Block], source: RecipeSource, document: CommentedMap) -> Block:
    file = Path(source) if isinstance(source, Path | str) else None
    # a link into a cache of blobs has its files beside itself, another link beside its target
    beside = [file.absolute().parent, file.resolve().parent] if file else []
    folders = [*dict.fromkeys([*beside, Path.cwd()])]
    try:
        return block.model_validate(plain(document), context={"folders": folders})
    except ValidationError as error:
        name = f"{file}: " if file else ""
        raise UserError("\n".join(f"{name}{line}" for line in _describe(error, block))) from error


def read_document(source: RecipeSource, overrides: list[str] | None = None) -> CommentedMap:
    """Read a recipe with the comments of its file, overrides applied, not yet validated.

    Raises UserError for what is no YAML mapping, and for an override that names no key.
    """
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    document = CommentedMap(source) if isinstance(source, Mapping) else _read_file(Path(source))
    for block, names in ALIASES.items():
        for alias, name in names.items():
            content = document.get(block)
            if isinstance(content, CommentedMap) and alias in content and name not in content:
                position = list(content).index(alias)
                content.insert(position, name, content.pop(alias))
    for override in overrides or []:
        _apply_override(document, override)
    return document


def _read_file(path: Path, what: str = "recipe") -> CommentedMap:
    if not path.is_file():
        raise UserError(f"{path}: no such {what} file")
    try:
        document = _round_trip().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({yaml_problem(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    if not isinstance(document, CommentedMap):
        raise UserError(f"{path}: a {what} is a mapping of keys; this file is not")
    return document


def recipe_text(recipe: Recipe, document: CommentedMap | None = None) -> str:
    """Write a recipe as YAML: the document with its comments, and every key that it leaves out.

    A value that the recipe holds otherwise (an absolute path, a measured number) replaces the
    document's.
    """
    document = CommentedMap() if document is None else document
    _fill_in(document, recipe.model_dump(mode="json"))
    text = io.StringIO()
    _round_trip().dump(document, text)
    return text.getvalue()


class _Representer(RoundTripRepresenter):
    """Writes null as a word: an empty value looks like a mistake."""


_Representer.add_representer(
    type(None), lambda yaml, _: yaml.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _round_trip() -> YAML:
    yaml = YAML(typ="rt")
    yaml.Representer = _Representer
    yaml.width = 100
    yaml.preserve_quotes = True
    return yaml


def _fill_in(node: CommentedMap, content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        there = node.get(key)
        if isinstance(there, CommentedMap) and isinstance(value, Mapping):
            _fill_in(there, value)
        elif _mappings(there) and _mappings(value) and len(there) == len(value):
            for item, filled in zip(there, value, strict=True):
                _fill_in(item, filled)
        elif key not in node or plain(there) != value:
            node[key] = value


def _mappings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _apply_override(document: CommentedMap, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"-s {override}: write KEY=VALUE, e.g. -s objective.beta=0.1")
    *parents, last = key.split(".")
    node: Any = document
    for parent in parents:
        if isinstance(node, list):
            node = node[_position(node, parent, override)]
        else:
            node = node.setdefault(parent, CommentedMap())
        if not isinstance(node, Mapping | list):
            raise UserError(f"-s {override}: {parent} is a value, not a block")
    try:
        content = parse_yaml(value)
    except YAMLError as error:
        problem = yaml_problem(error)
        raise UserError(f"-s {override}: the value is not valid YAML ({problem})") from error
    node[_position(node, last, override) if isinstance(node, list) else last] = content


def _position(items: list[Any], key: str, override: str) -> int:
    """Index of a list item, by number or by its `name`."""
    for index, item in enumerate(items):
        if str(index) == key or (isinstance(item, Mapping) and item.get("name") == key):
            return index
    raise UserError(f"-s {override}: no item {key} in that list")


_UNION_MEMBERS = {*SCORER_TYPES, "DatasetSource", "str", "float", "int", "bool"}
"""What pydantic puts into the place of an error beside the keys."""


def _describe(error: ValidationError, block: type[Settings]) -> list[str]:
    """One line per error: key, what is wrong, the value, and a suggestion for a misspelt key."""
    lines = []
    for item in error.errors():
        parts = [str(p) for p in item["loc"] if p not in _UNION_MEMBERS and "[" not in str(p)]
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_suggestion(parts, block)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            for line in message.splitlines():
                lines.append(f"{key}: {line}" if key and not line.startswith(key) else line)
        else:
            shown = "" if isinstance(item["input"], dict | list) else f" (it is {item['input']!r})"
            lines.append(f"{key}: {item['msg'][0].lower() + item['msg'][1:]}{shown}")
    return list(dict.fromkeys(lines))


def _suggestion(parts: list[str], model: type[Settings]) -> str:
    """What was meant by an unknown key: one that is spelt alike, or the same key in its place."""
    *above, last = parts
    places = _schema_places(model)
    if last not in places:
        close = difflib.get_close_matches(last, places, n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if ".".join(part for part in above if not part.isdigit()) in places[last]:
        return " here; another type has it"
    block = min(places[last], key=lambda name: name.count("."))
    return f"; did you mean {f'{block}.{last}'.strip('.')}?"


def _schema_places(model: type[Settings]) -> dict[str, list[str]]:
    """Every key of the schema below `model`, with the dotted names of the blocks that have it."""
    places: dict[str, list[str]] = {}
    for name, block in schema_blocks(model).items():
        where = ".".join(part for part in name.split(".") if not part[:1].isupper())
        for key in block.model_fields:
            places.setdefault(key, []).append(where)
    return places


def schema_blocks(model: type[Settings], prefix: str = "") -> dict[str, type[Settings]]:
    """List every block of the schema by its dotted name, the recipe itself under the empty one."""
    blocks = {prefix: model}
    for name, field in model.model_fields.items():
        for cls in _settings_in(field.annotation):
            blocks |= schema_blocks(cls, f"{prefix}.{name}.{cls.__name__}".strip("."))
    return blocks


def _settings_in(annotation: object) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [cls for argument in arguments for cls in _settings_in(argument)]
