"""Scorers as a command line names them: `file.py:function`, a model's folder, or a recipe's
block."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constrained_dpo.draft.lines import shown
from data_prep.errors import UserError
from data_prep.scorers.settings import ScorerSettings, parse_scorer
from data_prep.settings import parse_yaml

FORMS = (
    "file.py:function, package.module:function, the folder or hub id of a model, or a block as in "
    "a recipe: {type: ...}"
)

_FUNCTION = re.compile(r"[\w./~-]+:(?P<name>[A-Za-z_]\w*)")
_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<rest>.+)", re.S)

MANY_PARAMETERS = 1_000_000_000
"""From so many on a scorer is loaded in half precision."""


@dataclass(frozen=True)
class NamedScorer:
    """A scorer of the recipe. block: its keys as they are written; why: by key, in words."""

    name: str
    block: dict[str, Any]
    settings: ScorerSettings
    why: dict[str, str]


def named_scorer(text: str, option: str, default_name: str | None = None) -> NamedScorer:
    """Read NAME=SPEC, or SPEC alone where it is a function or there is a default name.

    Raises UserError for what is no scorer.
    """
    match = _NAMED.fullmatch(text.strip())
    spec = match["rest"] if match else text.strip()
    function = _FUNCTION.fullmatch(spec)
    name = match["name"] if match else function["name"] if function else default_name
    if name is None or not spec:
        raise UserError(f"{option} {text}: write NAME=SPEC; SPEC is {FORMS}")
    block, why = _block(spec, f"{option} {text}", bool(function))
    return NamedScorer(name, block, parse_scorer(shown(block), option), why)


def _block(spec: str, where: str, is_function: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """A scorer's keys, and why each was chosen."""
    if spec.startswith("{"):
        parse_scorer(spec, where)
        return dict(parse_yaml(spec)), {}
    if spec.startswith(("http://", "https://")):
        raise UserError(
            f"{where}: a server's weights cannot be hashed, so say what it runs; write "
            f"{{type: http, url: {spec}, version: WORDS}}"
        )
    if is_function:
        return {"type": "python", "target": spec}, {}
    if (Path(spec).expanduser() / "adapter_config.json").is_file():
        raise UserError(
            f"{where}: a LoRA adapter scores by its DPO's implicit reward; write {{type: implicit, "
            f"adapter: {spec}, beta: B}}, B the β it was trained with"
        )
    return _model_block(spec, where)


def _model_block(spec: str, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    from constrained_dpo.draft.models import read_config

    config = read_config(spec, where)
    kind = (config.architectures or ["no architecture"])[0]
    says = f"its config says {kind}"
    if kind in ("LlamaForScore", "LlamaModelForScore"):
        return {"type": "beaver", "model": spec}, {"type": says}
    if kind.endswith("ForCausalLM"):
        return {"type": "guard", "model": spec}, {
            "type": f"{says}: a language model scores by its verdict, safe or unsafe"
        }
    if not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{where}: {says}, which is no scorer; give {FORMS}")
    if config.num_labels != 1:
        names = ", ".join(str(name) for name in config.id2label.values())
        raise UserError(
            f"{where}: it has {config.num_labels} labels ({names}), and one of them is the score; "
            f"write {{type: classifier, model: {spec}, label: NAME}}"
        )
    return _classifier_block(spec, where, f"{says}, one label: its logit is the score")


def _classifier_block(spec: str, where: str, says: str) -> tuple[dict[str, Any], dict[str, str]]:
    from constrained_dpo.draft.models import count_parameters, read_config, read_tokenizer
    from data_prep.prompts.templates import lacking_template

    block, why = {"type": "classifier", "model": spec}, {"type": says}
    if lacking_template(read_tokenizer(spec, where)) is None:
        block["text"] = "chat"
        why["text"] = "its tokenizer has a chat template"
    if count_parameters(read_config(spec, where), where) >= MANY_PARAMETERS:
        block["dtype"] = "bfloat16"
        why["dtype"] = "half the memory of float32"
    return block, why
