"""The papers' methods as settings: what `cdpo sweep --method` changes in a recipe, and which method
a recipe describes.

CAID: arXiv:2505.19387; MoCAN and PeCAN: arXiv:2405.19544. PeCAN and PeCAID are MoCAN and CAID on
implicit scorers. Each is a handful of the recipe's own keys; whatever else a recipe says (steps,
learning rate, rounds) is left as it is, and a step has as many sequences.
"""

import json

from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError

_PAPERS = (
    *("fit.labels=bernoulli", "fit.label_column=null", "fit.loss=logistic", "fit.group_size=2"),
    *("pool.grow=false", "pool.shares=null", "dual.confidence_side=none"),
    *("fit.conditional=null", "fit.refresh=1", "fit.loraplus_ratio=1"),
)


_FIXED = ("dual.method=fixed", "fit.conditional=null")


METHODS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "caid": ("dual.method=subgradient", "dual.init=one_shot", *_PAPERS),
    "mocan": ("dual.method=one_shot", *_PAPERS),
    "ours": (
        "dual.method=solve",
        "dual.init=one_shot",
        "dual.confidence_side=none",
        "fit.conditional={}",
        "fit.labels=soft",
        "fit.label_column=null",
        "pool.grow=true",
    ),
}
"""-s overrides by method; `recipe` is the recipe as it stands."""


WEIGHTED_SUM, ONE_OBJECTIVE = "weighted_sum", "dpo_"
"""λ fixed at given weights; `dpo_NAME`: one objective alone, by its name in the recipe (the ends of
the trade-off)."""


def uses_margins(method: str) -> bool:
    """Whether a method looks at the margins at all: λ is not fixed beforehand."""
    return method in METHODS


def method_overrides(
    method: str, recipe: Recipe, weights: dict[str, float] | None = None
) -> list[str]:
    """-s overrides that turn a recipe into a method; weights: λ of `weighted_sum`, by constraint.

    `dpo_NAME` maximizes NAME alone with λ = 0. Where NAME is a utility it becomes the reward and
    the recipe's reward a constraint with margin 0, so that both are still scored. Raises UserError
    for a method that there is not, or weights that do not fit.
    """
    if method in METHODS:
        return [
            *METHODS[method],
            *(_pairs_for_groups(recipe) if "fit.group_size=2" in METHODS[method] else []),
        ]
    problem = recipe.problem
    scored = (
        ["fit.labels=soft", "fit.label_column=null"] if recipe.fit.labels == "given" else []
    )  # people's labels know no weights
    if method == WEIGHTED_SUM:
        return [
            *_FIXED,
            f"dual.init={json.dumps(problem.multipliers(weights or {}).to_dict())}",
            *scored,
        ]
    name = method.removeprefix(ONE_OBJECTIVE)
    if method == name or name not in recipe.scorers:
        names = [*METHODS, WEIGHTED_SUM, *(f"{ONE_OBJECTIVE}{n}" for n in recipe.scorers)]
        raise UserError(
            f"--method {method}: there is no such method for this recipe; choose among "
            f"{', '.join(names)}"
        )
    if name == problem.reward:
        return [*_FIXED, "dual.init=zeros", *scored]
    blocks = {c.name: c.model_dump(mode="json") for c in recipe.objective.constraints}
    reward = recipe.objective.reward.model_dump(mode="json")
    others = [block for other, block in blocks.items() if other != name] + [
        reward | {"margin": 0.0}
    ]
    chosen = {key: blocks[name][key] for key in ("name", "scorer")}
    return [
        f"objective.reward={json.dumps(chosen)}",
        f"objective.constraints={json.dumps(others)}",
        *_FIXED,
        "dual.init=zeros",
        *scored,
    ]


def _pairs_for_groups(recipe: Recipe) -> list[str]:
    """Overrides that give pairs the sequences which the recipe's groups have, in a step and of a
    prompt; [] where it has pairs."""
    fit, size = recipe.fit, recipe.fit.group_size
    if not fit.grouped:
        return []
    return [
        f"fit.batch_size={fit.batch_size * size // 2}",
        f"fit.pairs_per_prompt={fit.groups_per_prompt * size // 2}",
    ]


def is_fixed(recipe: Recipe) -> bool:
    """Whether λ is given beforehand, so that the margins demand nothing of the policy."""
    return not recipe.objective.constraints or (
        recipe.dual.method == "fixed" and recipe.dual.init != "one_shot"
    )


def is_weighted_sum(recipe: Recipe) -> bool:
    init = recipe.dual.init
    return (
        is_fixed(recipe)
        and bool(recipe.objective.constraints)
        and isinstance(init, dict)
        and any(init.values())
    )


def describe_method(recipe: Recipe) -> str:
    """The paper's name of what a recipe does, or a few words where no paper has one."""
    dual, fit, objective = recipe.dual, recipe.fit, recipe.objective
    if fit.labels == "given":
        return f"DPO on {fit.label_column}"
    if is_fixed(recipe):
        return "weighted sum" if is_weighted_sum(recipe) else f"DPO on {objective.reward.name}"
    implicit = all(scorer.type == "implicit" for scorer in recipe.scorers.values())
    papers = (
        fit.labels == "bernoulli"
        and fit.loss != "listwise"
        and fit.group_size == 2
        and not recipe.pool.grow
    )
    one_shot = dual.method in ("one_shot", "fixed")
    if papers and one_shot:
        return "PeCAN" if implicit else "MoCAN"
    if papers and dual.method == "subgradient" and dual.init == "one_shot" and not dual.with_room:
        return "PeCAID" if implicit else "CAID"
    kind = "one-shot" if one_shot else dual.method
    if dual.method == "solve":
        return f"conditional policy, {fit.labels} labels"
    return f"{kind}, {fit.labels} labels, {'growing' if recipe.pool.grow else 'fixed'} pool"


def settings_line(recipe: Recipe) -> str:
    """A method's settings in one line: how λ moves, what is fitted on which labels and pool, β, how
    long."""
    dual, fit = recipe.dual, recipe.fit
    steps = "steps by the number of prompts" if fit.steps is None else f"{fit.steps} steps"
    if fit.epochs is not None:
        steps = f"{fit.epochs:g} epoch{'' if fit.epochs == 1 else 's'}"
    rows = (
        "pairs"
        if fit.group_size == 2 and fit.loss != "listwise"
        else f"{fit.loss} groups of {fit.group_size}"
    )
    moves = {
        "solve": f"λ solved for by trials of a conditional policy, from λ_0 {_start(dual.init)}",
        "subgradient": f"subgradient steps η {dual.step_size:g} from λ_0 {_start(dual.init)}",
        "one_shot": "λ one-shot, kept",
        "fixed": f"λ fixed at {_start(dual.init)}",
    }[dual.method]
    if not recipe.objective.constraints:
        moves = "no constraint"
    elif dual.with_room:
        moves += (
            " on the lower bound" if dual.method == "subgradient" else ", with room for the test"
        )
    pool = "growing pool" if recipe.pool.grow else "fixed pool"
    return (
        f"{moves}; {fit.labels} labels, {rows}, {pool}; β {recipe.objective.beta:g}; "
        f"{dual.rounds} round{'s' if dual.rounds > 1 else ''} "
        f"of {steps} × {fit.batch_size * fit.gradient_accumulation} at {fit.learning_rate:g}"
    )


def _start(init: str | dict[str, float]) -> str:
    if isinstance(init, dict):
        return ", ".join(f"{name} {value:g}" for name, value in init.items())
    return {"zeros": "0", "one_shot": "one-shot"}[init]


def method_content(recipe: Recipe) -> dict[str, object]:
    """Dotted keys and values of what makes the method: the recipe without name, seed, margins,
    thresholds, devices, step_scale (`prepare` turns `auto` into numbers that depend on the samples)
    and a weighted sum's weights. Runs of equal content are points of one line."""
    content = recipe.model_dump(mode="json")
    weights = "init" if is_weighted_sum(recipe) else None
    content["dual"] = {
        key: value for key, value in content["dual"].items() if key not in ("step_scale", weights)
    }
    content = {key: value for key, value in content.items() if key not in ("name", "seed")}
    constraints = content["objective"]["constraints"]
    content["objective"]["constraints"] = [
        {key: constraint[key] for key in ("name", "scorer")} for constraint in constraints
    ]
    return dict(_flat(content))


def _flat(content: object, prefix: str = "") -> list[tuple[str, object]]:
    if isinstance(content, dict) and content:
        return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}{key}.")]
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [
            pair for item in content for pair in _flat(item, f"{prefix}{item.get('name', '')}.")
        ]
    if prefix.endswith("device."):
        return []
    return [
        (
            prefix[:-1],
            content
            if isinstance(content, str | int | float | bool | None)
            else json.dumps(content, sort_keys=True),
        )
    ]


def method_labels(recipes: list[Recipe]) -> list[str]:
    """A label per recipe, equal where the method is: its name, and the keys that differ where
    several methods share a name."""
    contents = [method_content(recipe) for recipe in recipes]
    names = [describe_method(recipe) for recipe in recipes]
    labels = []
    for content, name in zip(contents, names, strict=True):
        alike = [c for c, n in zip(contents, names, strict=True) if n == name]
        several = [
            key
            for key in dict.fromkeys(k for c in alike for k in c)
            if len({c.get(key) for c in alike}) > 1
        ]
        shown = [f"{key.rpartition('.')[2]} {content.get(key)}" for key in several[:4]]
        more = f", {len(several) - 4} more" if len(several) > 4 else ""
        labels.append(f"{name} ({', '.join(shown)}{more})" if several else name)
    return labels
