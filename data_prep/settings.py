"""What every block of a recipe shares: strict keys, immutability, paths, YAML, and seeds."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core.core_schema import ValidationInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from data_prep.errors import UserError

EMBEDDED = "quickstart"
"""The name of the embedded world's policy and prompts, where a path or hub id may stand."""

T = TypeVar("T")


class Settings(BaseModel):
    """A block of the recipe. Unknown keys are errors; a block never changes after it was read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def _absolute(value: str, info: ValidationInfo) -> str:
    """A file or folder that exists, relative to one of the context's `folders`, as absolute; a
    function of a file keeps its name behind the colon, and a link its own name: a link into a cache
    of blobs says by its ending what it is. Anything else stays as it is."""
    name, colon, function = value.rpartition(":") if ".py:" in value else (value, "", "")
    for folder in (info.context or {}).get("folders", ()) if value != EMBEDDED else ():
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
        problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise UserError(f"{option}: {problem}; {advice}") from error
    except YAMLError as error:
        raise UserError(f"{option}: {yaml_problem(error)}; {advice}") from error


def derive_seed(seed: int, round_number: int, phase: str, index: int = 0) -> int:
    """Derive a 63-bit seed from (seed, round, phase, index), so that no draw depends on history."""
    key = f"{seed}/{round_number}/{phase}/{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
