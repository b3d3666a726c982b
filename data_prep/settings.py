"""What every block of a recipe shares: strict keys, immutability, and one error type for a user's
mistake."""

import hashlib

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from data_prep.errors import UserError


class Settings(BaseModel):
    """A block of the recipe. Unknown keys are errors; a block never changes after it was read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def parse_option(block: type, text: str, option: str, advice: str):
    """A settings block from a command-line option's YAML; raises UserError, which ends with
    `advice`."""
    try:
        return TypeAdapter(block).validate_python(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        detail = (
            f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
            if first
            else str(error).splitlines()[0]
        )
        raise UserError(f"{option}: {detail}; {advice}") from error


def derive_seed(seed: int, round_number: int, phase: str, index: int = 0) -> int:
    """A 63-bit seed that is a pure function of (seed, round, phase, index): what is drawn never
    depends on history."""
    key = f"{seed}/{round_number}/{phase}/{index}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
