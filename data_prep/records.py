"""Records: frozen, typed objects that are written as JSON and read back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from data_prep.files import read_json


class Record(BaseModel):
    """A typed object with a JSON form. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True
    )

    def to_json(self) -> dict[str, Any]:
        """Give the JSON form: plain dicts, lists, numbers and texts."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str | Path = "record") -> Self:
        """Read the JSON form; where: names it in messages.

        Raises UserError for what is missing, too much, or of another type.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{where}: {key}: {first['msg'][0].lower() + first['msg'][1:]}; restore it from a "
                "backup"
            ) from error

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read the record from its file. Raises UserError where it is gone or damaged."""
        return cls.from_json(read_json(file), file)
