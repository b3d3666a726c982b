"""docs/reference.md: every public name has its place there and its docstring. The build of the site
fails on a name that is not there."""

import dataclasses
import importlib
import re
from fnmatch import fnmatch

import pytest

import constrained_dpo
import data_prep
from tests.helpers.paths import REPO

REFERENCE = (REPO / "docs" / "reference.md").read_text()
LISTED = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)


def documented(name: str) -> object:
    """What a name of the API reference stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def docstrings(thing: type) -> str:
    """Those of a class and of its bases here, without the one that a dataclass is given."""
    ours = [c for c in thing.__mro__ if c.__module__.startswith(("constrained_dpo", "data_prep"))]
    texts = [c.__dict__.get("__doc__") or "" for c in ours]
    return " ".join(text for text in texts if not re.match(r"\w+\(.*\)$", text))


def undocumented(thing: object) -> list[str]:
    """Public names of a class or function without a docstring; a field is described by its own
    description or by name in the class's docstring (`u_ci_*` names several)."""
    if not isinstance(thing, type):
        return [] if thing.__doc__ else [thing.__name__]
    missing = [] if docstrings(thing) else [thing.__name__]
    for name, member in vars(thing).items():
        if hasattr(member, "__get__") and not name.startswith("_") and not member.__doc__:
            missing.append(name)
    described = re.findall(r"[A-Za-z_*]{2,}|\bu\b", docstrings(thing))
    for name, field in field_descriptions(thing).items():
        if not field and not any(fnmatch(name, pattern) for pattern in described):
            missing.append(name)
    return missing


def field_descriptions(thing: type) -> dict[str, str | None]:
    """The fields of a record, of settings or of a dataclass."""
    if dataclasses.is_dataclass(thing):
        return dict.fromkeys(field.name for field in dataclasses.fields(thing))
    fields = getattr(thing, "model_fields", {})
    return {name: field.description for name, field in fields.items()}


@pytest.mark.parametrize("name", LISTED)
def test_every_name_of_the_api_reference_is_documented(name):
    assert not undocumented(documented(name))


def test_every_public_name_is_in_the_api_reference():
    assert len(LISTED) == len(set(LISTED))
    there = {id(documented(name)) for name in LISTED}
    public = [f"{p.__name__}.{n}" for p in (constrained_dpo, data_prep) for n in p.__all__]
    assert not [name for name in public if id(documented(name)) not in there]


def test_an_undocumented_name_is_seen():
    @dataclasses.dataclass
    class Bare:
        size: int

        def double(self):
            return 2 * self.size

    Bare.__module__ = "constrained_dpo.api"
    assert undocumented(Bare) == ["Bare", "double", "size"]
    Bare.__doc__, Bare.double.__doc__ = "A size.", "Double it."
    assert not undocumented(Bare)
