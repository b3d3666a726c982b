"""The tables of every recipe key in recipes/README.md and of every gate key in docs/guide/gate.md,
generated from the schemas: `python -m tests.helpers.recipe_keys` writes them anew."""

import json
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.recipe.load import schema_blocks
from constrained_dpo.recipe.schema import Recipe
from data_prep.settings import Settings

REPO = Path(__file__).resolve().parents[2]
README = REPO / "recipes" / "README.md"
GATE = REPO / "docs" / "guide" / "gate.md"
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->"


def values_of(annotation: object) -> list[str]:
    """What a key may hold, in words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [str(a) for a in get_args(annotation)]
    if origin in (Union, types.UnionType):
        return list(dict.fromkeys(v for each in get_args(annotation) for v in values_of(each)))
    if origin is list:
        return [f"list of {' or '.join(values_of(get_args(annotation)[0]))}s"]
    if origin is tuple:
        return ["two numbers"]
    if origin is dict:
        return ["{name: number}"]
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return ["block"]
    if annotation in (str, int, float, bool, type(None)):
        return {
            str: ["text"],
            int: ["integer"],
            float: ["number"],
            bool: ["true", "false"],
            type(None): ["null"],
        }[annotation]
    return values_of(get_args(annotation)[0])  # Annotated


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return ""
    default = field.default
    if isinstance(default, Settings):
        default = default.model_dump(exclude_defaults=True)
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def title_of(name: str, block: type[Settings]) -> str:
    if "type" in block.model_fields:
        return f"scorer `type: {get_args(block.model_fields['type'].annotation)[0]}`"
    if {"dataset", "split"} <= block.model_fields.keys():
        return "`prompts.source` and `prompts.test` as a block"
    parts = [p for p in name.split(".") if p and not p[0].isupper()]
    return f"`{'.'.join(parts)}`" if parts else "the recipe"


def first_sentence(block: type[Settings]) -> str:
    """What a block is: the first paragraph of its docstring, on one line."""
    return " ".join((block.__doc__ or "").split("\n\n")[0].split())


def gate_table() -> str:
    """Markdown, one table per block of gate.yaml; its scorers are those of the recipe."""
    blocks = schema_blocks(GateSettings).items()
    return key_table({n: b for n, b in blocks if "type" not in b.model_fields}, "the gate")


def key_table(blocks: dict[str, type[Settings]] | None = None, whole: str = "the recipe") -> str:
    """Markdown, one table per block of the schema (None: the recipe's)."""
    lines, seen = [], set()
    for name, block in (schema_blocks(Recipe) if blocks is None else blocks).items():
        if block in seen:
            continue
        seen.add(block)
        title = title_of(name, block) if name else whole
        lines += [f"**{title}**: {first_sentence(block)}", ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        for key, field in block.model_fields.items():
            cells = (
                f"`{key}`",
                ", ".join(values_of(field.annotation)),
                default_of(field),
                field.description or "",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    for file, table in ((README, key_table()), (GATE, gate_table())):
        before, rest = file.read_text().split(BEGIN)
        file.write_text(f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}")
