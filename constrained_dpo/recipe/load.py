"""From a YAML file and -s overrides to a validated recipe; all errors are shown at once."""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path

import yaml
from pydantic import ValidationError

from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.models.settings import QUICKSTART
from data_prep.scorers.settings import SCORER_TYPES
from data_prep.settings import Settings


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice is an error, and 5e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and validates a recipe; relative paths in it become absolute. `overrides` are KEY=VALUE
    with dotted keys.

    Raises UserError with every error, one per line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({_yaml_problem(error)})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys; this file is not")
    for override in overrides or []:
        _apply_override(raw, override)
    _resolve_paths(raw, path.resolve().parent)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in _describe(error))) from error


def _apply_override(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"-s {override}: write KEY=VALUE, e.g. -s objective.beta=0.1")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = (
            node[_position(node, parent, override)]
            if isinstance(node, list)
            else node.setdefault(parent, {})
        )
        if not isinstance(node, dict | list):
            raise UserError(f"-s {override}: {parent} is a value, not a block")
    if isinstance(node, list):
        last = _position(node, last, override)
    try:
        node[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(
            f"-s {override}: the value is not valid YAML ({_yaml_problem(error)})"
        ) from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _position(items: list, key: str, override: str) -> int:
    """Index of a list item, by number or by its `name`."""
    for index, item in enumerate(items):
        if str(index) == key or (isinstance(item, dict) and item.get("name") == key):
            return index
    raise UserError(f"-s {override}: no item {key} in that list")


def _resolve_paths(raw: dict, folder: Path) -> None:
    """Makes file and folder names absolute where they exist relative to the recipe (first) or to
    the working directory."""

    def absolute(value: object) -> object:
        if not isinstance(value, str):
            return value
        name, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
        for base in (folder, Path.cwd()):
            candidate = base / Path(name).expanduser()
            if name and candidate.exists():
                return f"{candidate.resolve()}{colon}{function}"
        return value

    def visit(node: object, keys: tuple[str, ...]) -> None:
        for key in keys:
            if isinstance(node, dict) and key in node:
                node[key] = absolute(node[key])

    if isinstance(raw.get("policy"), dict):
        visit(
            raw["policy"],
            ("reference_adapter",)
            if raw["policy"].get("model") == QUICKSTART
            else ("model", "reference_adapter"),
        )
    visit(raw.get("prompts"), ("source", "train", "test", "eval"))
    for source in raw["prompts"].values() if isinstance(raw.get("prompts"), dict) else ():
        visit(
            source,
            ("dataset",)
            if isinstance(source, dict) and source.get("dataset") != QUICKSTART
            else (),
        )
    objective = raw.get("objective")
    if isinstance(objective, dict):
        constraints = objective.get("constraints")
        for block in [
            objective.get("reward"),
            *(constraints if isinstance(constraints, list) else []),
        ]:
            if isinstance(block, dict):
                visit(
                    block.get("scorer"),
                    ("model", "target", "file", "adapter", "reference", "calibrate"),
                )


def _describe(error: ValidationError) -> list[str]:
    """One line per error: key, what is wrong, the value, and a suggestion for a misspelt key."""
    lines = []
    for item in error.errors():
        parts = [
            str(p)
            for p in item["loc"]
            if not (p in SCORER_TYPES or "[" in str(p) or p in ("DatasetSource", "str", "float"))
        ]
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(parts[-1], _known_keys(Recipe), n=1)
            lines.append(f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else ""))
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            lines += [
                f"{key}: {part}" if key and not part.startswith(key) else part
                for part in message.splitlines()
            ]
        else:
            shown = "" if isinstance(item["input"], dict | list) else f" (it is {item['input']!r})"
            lines.append(f"{key}: {item['msg'][0].lower() + item['msg'][1:]}{shown}")
    return list(dict.fromkeys(lines))


def _known_keys(model: type[Settings]) -> set[str]:
    """Every key of the schema below `model`."""
    keys: set[str] = set()
    for name, block in schema_blocks(model).items():
        keys |= set(block.model_fields) | ({name.split(".")[-1]} if name else set())
    return keys


def schema_blocks(model: type[Settings], prefix: str = "") -> dict[str, type[Settings]]:
    """Dotted name → settings class of every block of the schema, the recipe itself under the empty
    name."""
    blocks = {prefix: model}
    for name, field in model.model_fields.items():
        for cls in _settings_in(field.annotation):
            blocks |= schema_blocks(cls, f"{prefix}.{name}.{cls.__name__}".strip("."))
    return blocks


def _settings_in(annotation: object) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [cls for part in getattr(annotation, "__args__", ()) for cls in _settings_in(part)]
