"""The papers' methods as recipes: known by their settings, named where recipes are compared."""

import pytest

from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import (
    METHODS,
    describe_method,
    method_content,
    method_labels,
    method_overrides,
    settings_line,
)
from data_prep.errors import UserError
from tests.helpers.paths import QUICKSTART, RECIPES


def test_the_papers_methods_are_known_by_their_settings():
    recipe = load_recipe(QUICKSTART)
    words = {
        m: describe_method(load_recipe(QUICKSTART, method_overrides(m, recipe))) for m in METHODS
    }
    assert words == {
        "recipe": "subgradient, soft labels, growing pool",
        "caid": "CAID",
        "mocan": "MoCAN",
        "ours": "conditional policy, soft labels",
    }
    assert (
        describe_method(load_recipe(QUICKSTART, ["objective.constraints=[]"])) == "DPO on helpful"
    )
    weighted = load_recipe(QUICKSTART, method_overrides("weighted_sum", recipe, {"harmless": 0.5}))
    assert describe_method(weighted) == "weighted sum" and weighted.dual.init == {"harmless": 0.5}
    assert settings_line(weighted).startswith(
        "λ fixed at harmless 0.5; soft labels, pairs, growing pool; β 0.25; 7 rounds of 200 steps "
        "× 64"
    )
    safe = load_recipe(QUICKSTART, method_overrides("dpo_harmless", recipe))
    assert (
        safe.problem.reward == "harmless"
        and safe.problem.names == ["helpful"]
        and describe_method(safe) == "DPO on harmless"
    )
    assert (
        safe.scorers["harmless"] == recipe.scorers["harmless"]
        and safe.scorers["helpful"] == recipe.scorers["helpful"]
    )
    labelled = ["fit.labels=given", "fit.label_column=better_response_id", "pool.source=dataset"]
    people = load_recipe(QUICKSTART, labelled)
    for method, name in (
        ("dpo_helpful", "DPO on helpful"),
        ("dpo_harmless", "DPO on harmless"),
        ("weighted_sum", "weighted sum"),
    ):
        turned = load_recipe(
            QUICKSTART, [*labelled, *method_overrides(method, people, {"harmless": 0.5})]
        )
        assert describe_method(turned) == name and turned.fit.labels == "soft"
    with pytest.raises(
        UserError, match=r"--method dpo_funny: there is no such method .* choose among recipe, caid"
    ):
        method_overrides("dpo_funny", recipe)
    safe = RECIPES / "dpo_safe.yaml"
    people = load_recipe(
        safe, ["fit.labels=given", "fit.label_column=safer_response_id", "pool.source=dataset"]
    )
    assert (
        describe_method(people) == "DPO on safer_response_id"
        and describe_method(load_recipe(safe)) == "DPO on harmless"
    )
    assert describe_method(load_recipe(RECIPES / "pecaid_pku_saferlhf.yaml")) == "PeCAID"
    caid = load_recipe(RECIPES / "caid_pku_saferlhf.yaml")
    assert describe_method(caid) == "CAID"


def test_a_papers_method_has_the_passes_of_the_groups_that_it_replaces():
    path = RECIPES / "quickstart_std10.yaml"
    recipe = load_recipe(path)
    groups, caid = recipe.fit, load_recipe(path, method_overrides("caid", recipe)).fit
    assert (groups.group_size, caid.group_size, caid.loss) == (8, 2, "logistic")
    assert groups.batch_size * groups.group_size == caid.batch_size * caid.group_size == 128
    assert groups.groups_per_prompt * groups.group_size == caid.pairs_per_prompt * caid.group_size
    assert load_recipe(path, method_overrides("ours", recipe)).fit == groups
    two = load_recipe(path, ["fit.group_size=2"])  # listwise: groups still
    assert method_overrides("caid", two)[-2:] == ["fit.batch_size=16", "fit.pairs_per_prompt=67"]
    assert method_overrides("caid", load_recipe(QUICKSTART)) == list(METHODS["caid"])
    odd = load_recipe(path, ["fit.group_size=3", "fit.batch_size=5", "fit.groups_per_prompt=1"])
    assert method_overrides("mocan", odd)[-2:] == ["fit.batch_size=7", "fit.pairs_per_prompt=1"]


def test_labels_join_margins_and_seeds_and_say_what_else_differs():
    changes = [
        [],
        ["seed=4", "objective.constraints.harmless.margin=0.9", "name=x"],
        ["fit.steps=50"],
        list(METHODS["mocan"]),
    ]
    recipes = [load_recipe(QUICKSTART, c) for c in changes]
    assert method_content(recipes[0]) == method_content(recipes[1]) != method_content(recipes[2])
    base = "subgradient, soft labels, growing pool"
    assert method_labels(recipes) == [
        f"{base} (steps 200)",
        f"{base} (steps 200)",
        f"{base} (steps 50)",
        "MoCAN",
    ]
    assert method_labels(recipes[:2]) == [base, base]
