"""The recipe: one YAML file that fully describes a run. Typed and frozen; unknown keys are errors; all errors are shown at once.

The keys of `policy`, `prompts`, `sampling` and the scorers are defined, documented and read in `data_prep`; the rest here.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from constrained_dpo.fit_settings import FitSettings
from constrained_dpo.pool_settings import PoolSettings
from constrained_dpo.problem import ConstrainedProblem, Constraint
from data_prep.policy import QUICKSTART, PolicySettings
from data_prep.sampling import SamplingSettings
from data_prep.scorer_settings import NOT_IDENTIFIED, SCORER_TYPES, ScorerSettings
from data_prep.settings import Settings, UserError
from data_prep.sources import PromptSettings

STD = "std"
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class RewardSettings(Settings):
    """The objective that is maximized."""

    name: Name = Field(description="column name of the reward")
    scorer: ScorerSettings = Field(description="what scores it")


class ConstraintSettings(Settings):
    """A utility (higher is better) and the level it has to reach, in its own score units."""

    name: Name = Field(description="column name of the utility, and the constraint's name everywhere")
    margin: float | str | None = Field(
        None,
        description="b: at least so much above the reference policy; a number, or 0.5std: in std of π_ref's scores on the dual prompts",
    )
    threshold: float | None = Field(None, description="c: at least this, absolutely (instead of margin)")
    reference_std: float | None = Field(None, gt=0, description="written by `prepare`: what 1std of `margin` is in score units")
    scorer: ScorerSettings = Field(description="what scores it")

    @field_validator("margin", mode="before")
    @classmethod
    def _number_or_std(cls, value: object) -> object:
        if value is None:
            return None
        in_std = isinstance(value, str) and value.endswith(STD)
        try:
            number = math.nan if isinstance(value, bool) else float(value.removesuffix(STD) if in_std else value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"it is {value!r}; write a finite number, or a number of standard deviations such as 0.5std")
        return f"{number:.12g}{STD}" if in_std else number

    @property
    def margin_in_std(self) -> float | None:
        """The number of standard deviations of a margin in std."""
        return float(self.margin.removesuffix(STD)) if isinstance(self.margin, str) else None

    @property
    def constraint(self) -> Constraint:
        """With a margin in std in score units, where their number is known."""
        if self.margin_in_std is None:
            return Constraint(self.name, self.margin, self.threshold)
        if self.reference_std is None or self.threshold is not None:
            return Constraint(self.name, threshold=self.threshold, margin_in_std=self.margin_in_std)
        return Constraint(self.name, margin=self.margin_in_std * self.reference_std)


class ObjectiveSettings(Settings):
    """The constrained problem."""

    beta: float = Field(gt=0, description="β: price of a nat of KL to the reference policy, in reward units")
    reward: RewardSettings = Field(description="the reward")
    constraints: list[ConstraintSettings] = Field(description="the utilities; [] is single-reward DPO")


class DualSettings(Settings):
    """The multipliers and how they move."""

    method: Literal["subgradient", "one_shot", "fixed"] = Field(
        "subgradient",
        description="subgradient steps; one_shot: λ from reference samples, kept; fixed: λ = init, kept",
    )
    step_size: float = Field(0.5, gt=0, description="η, in units of step_scale")
    step_schedule: Literal["constant", "inverse_sqrt"] = Field("constant", description="η, or η/√(round+1)")
    step_scale: Literal["raw", "auto"] | dict[str, float] = Field(
        "auto", description="auto: std(r)/var(g) of the reference samples (resolved into numbers by `prepare`); raw: 1"
    )
    init: Literal["zeros", "one_shot"] | dict[str, float] = Field("one_shot", description="λ_0")
    max_lambda: float = Field(50.0, gt=0, description="upper bound of every multiplier")
    rounds: int = Field(4, ge=1, description="how many rounds `cdpo run` plays")
    prompts_per_round: int = Field(600, ge=2, description="dual prompts: a fixed subset of the fit prompts")
    responses_per_prompt: int = Field(8, ge=1, description="samples per dual or test prompt, of π_ref once and of π_θ each round")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals of u and of the verdict")
    confidence_side: Literal["none", "lower"] = Field(
        "none", description="lower: λ moves by the lower confidence bound of u, so that the constraint holds with probability `confidence`"
    )
    tolerance: float = Field(
        0.05, gt=0, description="`cdpo run --until-converged`: slack in shares of the rise asked for, and change of λ in shares of λ"
    )
    target_gap: float | None = Field(
        None, gt=0, description="`cdpo run --until-converged`: also the objective within this of the bound on the optimum (reward units)"
    )


class Recipe(Settings):
    """A whole run."""

    name: str = Field(description="what the run is called in tables and reports")
    seed: int = Field(0, ge=0, description="every draw is a function of (seed, round, phase, shard)")
    policy: PolicySettings = Field(description="base model and adapter")
    prompts: PromptSettings = Field(description="where prompts come from")
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="how responses are drawn")
    objective: ObjectiveSettings = Field(description="β, reward and constraints")
    pool: PoolSettings = Field(default_factory=PoolSettings, description="the pool of scored responses")
    dual: DualSettings = Field(default_factory=DualSettings, description="the multipliers")
    fit: FitSettings = Field(description="the DPO fit")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        problems = []
        try:
            problem = self.problem
            for key in ("init", "step_scale"):
                values = getattr(self.dual, key)
                if isinstance(values, dict):
                    try:
                        problem.multipliers(values)
                    except UserError as error:
                        problems.append(f"dual.{key}: {error}")
        except UserError as error:
            problems.append(f"objective: {error}")
        if self.sampling.max_new_tokens >= self.fit.max_length:
            problems.append("sampling.max_new_tokens leaves no room for a prompt within fit.max_length")
        problems += self.pool.too_few(
            self.fit.group_size, self.sampling.responses_per_prompt, self.dual.responses_per_prompt, self.dual.rounds
        )
        if self.fit.labels == "given":
            if self.pool.source == "reference":
                problems.append("fit.labels: given are labels of a dataset's responses; set pool.source: dataset (or both)")
            if self.pool.shares is not None or self.pool.max_per_prompt is not None:
                problems.append("fit.labels: given takes every labelled pair; drop pool.shares and pool.max_per_prompt")
        scorers = {c.name: c.scorer for c in (self.objective.reward, *self.objective.constraints)}
        for name, scorer in scorers.items():
            if scorer.type == "column":
                problems.append(f"scorer of {name}: a column scorer cannot score fresh samples; use it with `cdpo data score`")
        for constraint in self.objective.constraints:
            if constraint.scorer.type == "implicit" and constraint.threshold is not None:
                problems.append(f"objective.constraints.{constraint.name}.threshold: {NOT_IDENTIFIED}")
            if constraint.scorer.type == "implicit" and constraint.margin_in_std is not None:  # the std between prompts is log Z's
                problems.append(f"objective.constraints.{constraint.name}.margin: {constraint.margin}: {NOT_IDENTIFIED} as a number")
        if self.policy.model == QUICKSTART and self.sampling.max_new_tokens != 3:
            problems.append("the embedded world's answers have at most 3 tokens: sampling.max_new_tokens must be 3")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def problem(self) -> ConstrainedProblem:
        """The constrained problem; a margin in std is a number once `prepare` has measured its unit."""
        return ConstrainedProblem(self.objective.reward.name, self.objective.beta, tuple(c.constraint for c in self.objective.constraints))

    @property
    def scorers(self) -> dict[str, ScorerSettings]:
        """Scorer settings by objective name, the reward first."""
        return {c.name: c.scorer for c in (self.objective.reward, *self.objective.constraints)}

    def with_reference_stds(self, stds: dict[str, float | None]) -> "Recipe":
        """The recipe with `reference_std` of the named constraints."""
        constraints = [c.model_copy(update={"reference_std": stds[c.name]}) if c.name in stds else c for c in self.objective.constraints]
        return self.model_copy(update={"objective": self.objective.model_copy(update={"constraints": constraints})})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def hash(self) -> str:
        """Identity of the recipe: what differs from the defaults, so that a later release's new keys leave it as it is; without what
        `prepare` writes: dual.step_scale, which it resolves from `auto` into numbers, and reference_std."""
        measured = dict.fromkeys(c.name for c in self.objective.constraints)
        content = self.with_reference_stds(measured).model_dump(mode="json", exclude_defaults=True)
        dual = {key: value for key, value in content.pop("dual", {}).items() if key != "step_scale"}
        return hashlib.sha256(json.dumps([content, dual], sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: a key given twice is an error, and 5e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Reads and validates a recipe; relative paths in it become absolute. `overrides` are KEY=VALUE with dotted keys.

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
        node = node[_position(node, parent, override)] if isinstance(node, list) else node.setdefault(parent, {})
        if not isinstance(node, dict | list):
            raise UserError(f"-s {override}: {parent} is a value, not a block")
    if isinstance(node, list):
        last = _position(node, last, override)
    try:
        node[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"-s {override}: the value is not valid YAML ({_yaml_problem(error)})") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _position(items: list, key: str, override: str) -> int:
    """Index of a list item, by number or by its `name`."""
    for index, item in enumerate(items):
        if str(index) == key or (isinstance(item, dict) and item.get("name") == key):
            return index
    raise UserError(f"-s {override}: no item {key} in that list")


def _resolve_paths(raw: dict, folder: Path) -> None:
    """Makes file and folder names absolute where they exist relative to the recipe (first) or to the working directory."""

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
        visit(raw["policy"], ("reference_adapter",) if raw["policy"].get("model") == QUICKSTART else ("model", "reference_adapter"))
    visit(raw.get("prompts"), ("source", "train", "test", "eval"))
    for source in raw["prompts"].values() if isinstance(raw.get("prompts"), dict) else ():
        visit(source, ("dataset",) if isinstance(source, dict) and source.get("dataset") != QUICKSTART else ())
    objective = raw.get("objective")
    if isinstance(objective, dict):
        constraints = objective.get("constraints")
        for block in [objective.get("reward"), *(constraints if isinstance(constraints, list) else [])]:
            if isinstance(block, dict):
                visit(block.get("scorer"), ("model", "target", "file", "adapter", "reference", "calibrate"))


def _describe(error: ValidationError) -> list[str]:
    """One line per error: key, what is wrong, the value, and a suggestion for a misspelt key."""
    lines = []
    for item in error.errors():
        parts = [str(p) for p in item["loc"] if not (p in SCORER_TYPES or "[" in str(p) or p in ("DatasetSource", "str", "float"))]
        key = ".".join(parts)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(parts[-1], _known_keys(Recipe), n=1)
            lines.append(f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else ""))
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            lines += [f"{key}: {part}" if key and not part.startswith(key) else part for part in message.splitlines()]
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
    """Dotted name → settings class of every block of the schema, the recipe itself under the empty name."""
    blocks = {prefix: model}
    for name, field in model.model_fields.items():
        for cls in _settings_in(field.annotation):
            blocks |= schema_blocks(cls, f"{prefix}.{name}.{cls.__name__}".strip("."))
    return blocks


def _settings_in(annotation: object) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [cls for part in getattr(annotation, "__args__", ()) for cls in _settings_in(part)]
