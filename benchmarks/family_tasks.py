"""The runs of bench_family: worlds, settings, recipes."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from data_prep.quickstart import PROMPTS
from tests.helpers.paths import REPO

WORLDS = ("embedded", "random 1", "random 2", "random 3", "random 4", "random 5")
SCALES = {"std 1": (1, 0.25), "std 10": (10, 0.1)}  # of scores, β
KAPPA = [0.5, 1.5]
HEAD = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
Changes = dict[str, dict[str, object]]  # by block of the recipe
PLAIN: Changes = {
    "fit": {"conditional": None, "refresh": 1, "loraplus_ratio": 1, "learning_rate": 1e-3},
    "dual": {"method": "subgradient", "step_size": 0.3, "confidence_side": "none"},
}
CONDITIONAL: Changes = {
    "fit": {"conditional": {}, "refresh": 4, "loraplus_ratio": 16, "learning_rate": 5e-4},
    "dual": {"method": "solve", "confidence_side": "none"},
}
SETTINGS: dict[str, Changes] = {
    "conditional": CONDITIONAL,
    "plain": PLAIN,
    "minimal": {"dual": {"confidence_side": "none"}},  # policy, prompts and objective alone
}
STD10: dict[str, Changes] = {  # listwise, where pairs saturate
    "conditional": {"fit": {"loss": "listwise", "learning_rate": 2e-3, "loraplus_ratio": 1}},
    "plain": {
        "fit": {"loss": "listwise", "learning_rate": 2e-3},
        "dual": {"step_schedule": "inverse_sqrt", "step_size": 0.6},
    },
}


@dataclass(frozen=True)
class Task:
    """One run. two: a second constraint; categories: `eight` constraints, one for each kind of
    prompts (`category_files`), or their `mean` as one; tail: the constraint is on the lowest 5 % of
    the utility; lambda_0: λ_0 in shares of the exact λ*, None: from samples; kappa: rows vary κ
    too; front: what the family is worth at eleven margins; changes: KEY=VALUE of the recipe;
    quantization: of the base."""

    world: str
    seed: int = 0
    setting: str = "conditional"
    scale: str = "std 1"
    two: bool = False
    rounds: int = 4
    lambda_0: float | None = None
    kappa: bool = False
    front: bool = False
    changes: tuple[str, ...] = ()
    quantization: str = "nf4"
    categories: str = ""
    tail: bool = False

    @classmethod
    def from_json(cls, content: dict) -> "Task":
        return cls(**content | {"changes": tuple(content["changes"])})

    def to_json(self) -> dict:
        return asdict(self)

    @property
    def kind(self) -> "Task":
        """What runs of several worlds and seeds have in common."""
        return replace(self, world="", seed=0, rounds=0, front=False)

    def words(self) -> str:
        """Name the run in a table."""
        parts = [self.setting, self.scale]
        parts += ["two constraints"] * self.two
        parts += [f"categories: {self.categories}"] * bool(self.categories)
        parts += ["tail of 5 %"] * self.tail
        parts += [] if self.lambda_0 is None else [f"λ_0 at {self.lambda_0:g} times λ\\*"]
        parts += ["κ"] * self.kappa + list(self.changes)
        return ", ".join(parts)


def recipe_of(task: Task) -> dict:
    """Write out a run's recipe: quickstart.yaml with the world's scorers and the setting."""
    recipe = yaml.safe_load((REPO / "recipes" / "quickstart.yaml").read_text())
    recipe |= {"name": "family", "seed": task.seed, "objective": _objective(task)}
    recipe["policy"] |= {"quantization": task.quantization}
    recipe["policy"]["lora"]["target_modules"] = HEAD
    if not task.categories:
        recipe["prompts"]["max_test"] = 4  # the test prompts play no part here
    if task.setting == "minimal":
        recipe |= {"pool": {}, "dual": {}, "fit": {}}
        recipe["sampling"] = {"max_new_tokens": recipe["sampling"]["max_new_tokens"]}
    changes = [SETTINGS[task.setting]]
    changes += [STD10.get(task.setting, {})] if task.scale == "std 10" else []
    for blocks in changes:
        for block, values in blocks.items():
            recipe[block] = recipe[block] | values
    recipe["dual"]["rounds"] = max(task.rounds, 7)
    if task.kappa:
        recipe["fit"]["conditional"] = {"kappa": KAPPA}
    return recipe


def _objective(task: Task) -> dict:
    factor, beta = SCALES[task.scale]
    suffix = "" if factor == 1 else f"_x{factor}"
    embedded = task.world == "embedded"
    number = task.world.split()[-1]
    module = "data_prep.quickstart" if embedded else str(REPO / "tests" / "helpers" / "worlds.py")
    names = (
        ("helpful", "harmless", "humor")
        if embedded
        else (f"reward_{number}", f"utility_{number}a", f"utility_{number}b")
    )
    margins = [0.5, 0.2 if embedded else 0.5]
    scorers = [{"type": "python", "target": f"{module}:{name}{suffix}"} for name in names]
    constraints = [
        {"name": f"g{i}", "margin": factor * margin, "scorer": scorer}
        for i, (margin, scorer) in enumerate(zip(margins, scorers[1:], strict=True), start=1)
    ]
    if task.categories == "eight":
        constraints[0] |= {"by": "kind", "min_prompts": 2}
    if task.tail:
        constraints[0] |= {"kind": "tail", "level": 0.05}
    return {
        "beta": beta,
        "reward": {"name": "r", "scorer": scorers[0]},
        "constraints": constraints if task.two else constraints[:1],
    }


def category_files(folder: Path) -> dict[str, str]:
    """Write the embedded world's prompts with eight kinds that share nothing: the object, and
    whether it is opened; `source` and `test` of a recipe's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"source": folder / "train.jsonl", "test": folder / "test.jsonl"}
    for split, file in zip(("train", "test"), files.values(), strict=True):
        rows = [{"prompt": prompt, "kind": _kind(prompt)} for prompt in PROMPTS[split]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {key: str(file) for key, file in files.items()}


def with_kinds(prompts: pd.DataFrame) -> pd.DataFrame:
    """Add the kinds of `category_files` to a prompts table."""
    return prompts.assign(kind=[[_kind(prompt)] for prompt in prompts["prompt"]])


def _kind(prompt: str) -> str:
    _, verb, thing = prompt.split()
    return f"{thing}_{'opened' if verb == 'open' else 'other'}"
