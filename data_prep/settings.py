"""What every block of a recipe shares: strict keys, immutability, paths, YAML, and seeds."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, LiteralString, Self, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ValidationInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from data_prep.errors import UserError

EMBEDDED, EVERYDAY = "quickstart", "everyday"
"""The names of the embedded world's policy and prompts, and of the everyday questions, where a path
or hub id may stand."""

SHIPPED = (EMBEDDED, EVERYDAY)

T = TypeVar("T")


class Settings(BaseModel):
    """A block of the recipe. Unknown keys are errors; a block never changes after it was read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="wrap")
    @classmethod
    def _no_truth_values(cls, values: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """A truth value is no number, index or label: Python would take true for 1. Named beside
        all other errors of the block."""
        wrong = _misplaced_truths(cls, values) if isinstance(values, Mapping) else {}
        if not wrong:
            return read(values)
        errors = [_error("value_error", TRUTH.format(_shown(v)), (k,), v) for k, v in wrong.items()]
        try:
            read(values)
        except ValidationError as error:
            errors += [
                _error(item["type"], item["msg"], item["loc"], item["input"])
                for item in error.errors()
                if not (item["loc"] and item["loc"][0] in wrong)
            ]
        raise ValidationError.from_exception_data(cls.__name__, errors)


TRUTH = 'holds a truth value (it is {}); write a number, or put a word in quotes, as in "true"'


def _error(kind: str, message: str, place: tuple[int | str, ...], value: Any) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError(cast(LiteralString, kind), cast(LiteralString, message)),
        loc=place,
        input=value,
    )


def _misplaced_truths(block: type[Settings], values: Mapping[Any, Any]) -> dict[str, Any]:
    """The keys whose value is or holds a truth value, where the field's type has none."""
    wrong = {}
    for name, field in block.model_fields.items():
        alias = field.validation_alias
        keys = [name, *(alias.choices if isinstance(alias, AliasChoices) else ())]
        inside = not _mentions(field.annotation, Settings)
        for key in map(str, keys if not _mentions(field.annotation, bool) else ()):
            if key in values and _holds_truth(values[key], inside):
                wrong[key] = values[key]
    return wrong


def _mentions(annotation: object, kind: type) -> bool:
    """Whether a field's type is `kind` or has it among its members."""
    if isinstance(annotation, type) and issubclass(annotation, kind):
        return True
    return any(_mentions(argument, kind) for argument in get_args(annotation))


def _holds_truth(value: object, inside: bool) -> bool:
    """Whether a value is, or a list holds, a truth value; inside: a mapping's values count too."""
    if isinstance(value, list | tuple):
        return any(_holds_truth(item, inside) for item in value)
    if isinstance(value, Mapping):
        return inside and any(_holds_truth(item, inside) for item in value.values())
    return isinstance(value, ScalarBoolean | bool)


def _shown(value: object) -> str:
    """A value as YAML writes it, short."""
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


def _absolute(value: str, info: ValidationInfo) -> str:
    """A file or folder that exists, relative to one of the context's `folders`, as absolute; a
    function of a file keeps its name behind the colon, and a link its own name: a link into a cache
    of blobs says by its ending what it is. Anything else stays as it is."""
    name, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    for folder in (info.context or {}).get("folders", ()) if value not in SHIPPED else ():
        candidate = folder / Path(name).expanduser()
        if name and candidate.exists():
            link = candidate.parent.resolve() / candidate.name
            path = link if candidate.name not in ("", "..") else candidate.resolve()
            return f"{path}{colon}{function}"
    return value


LocalPath = Annotated[str, AfterValidator(_absolute)]
"""A path, relative to the recipe's folder or to the working directory; hub ids pass unchanged."""


def parse_yaml(text: str) -> Any:
    """Read a value in YAML 1.2. Raises YAMLError."""
    return YAML(typ="safe", pure=True).load(text)


def yaml_problem(error: YAMLError) -> str:
    """Say in a line what is wrong with a YAML text."""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    twice = re.match(r'found duplicate key "?(.+?)"? with value', problem)
    return f"key {twice[1]!r} is given twice" if twice else problem


def plain(value: Any) -> Any:
    """Strip a YAML document of its comments and styles: plain dicts, lists, numbers and texts."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, ScalarBoolean | bool):
        return bool(value)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def parse_option(block: TypeAdapter[T], text: str, option: str, advice: str) -> T:
    """Read a settings block from a command-line option's YAML.

    Raises UserError, whose line ends with `advice`.
    """
    try:
        return block.validate_python(parse_yaml(text))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        problem = f"{'.'.join(map(str, first['loc']))} {message}".strip()
        raise UserError(f"{option}: {problem}; {advice}") from error
    except YAMLError as error:
        raise UserError(f"{option}: {yaml_problem(error)}; {advice}") from error


def derive_seed(seed: int, round_number: int, phase: str, index: int = 0) -> int:
    """Derive a 63-bit seed from (seed, round, phase, index), so that no draw depends on history."""
    key = f"{seed}/{round_number}/{phase}/{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
