"""One adapter for all categories: gates that differ by prompt, and the ordinary adapter that is
distilled from them, against every answer's exact law."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pytest import approx
from safetensors.numpy import load_file

from constrained_dpo.fit import distill
from constrained_dpo.fit.adapter import save_adapter
from constrained_dpo.fit.contexts import context_gates, label_contexts, read_contexts
from constrained_dpo.fit.distill import distill_member
from constrained_dpo.fit.family import (
    Family,
    family_for,
    read_family,
    scaled_weights,
    write_adapter,
    write_member,
)
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.kinds import Measure
from constrained_dpo.launch import shards_base
from constrained_dpo.problem import Constraint
from constrained_dpo.recipe.fit import ConditionalSettings
from data_prep.errors import UserError
from data_prep.labels.groups import label_groups
from data_prep.labels.multipliers import MultiplierRange
from data_prep.models.policy import load_policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.quickstart import build_policy
from data_prep.sampling.enumeration import exact_logps
from tests.helpers.fits import (
    LORA,
    PROMPT_TABLE,
    built_trainer,
    fit_log,
    fit_settings,
    gated_rows,
    make_family,
    make_pool,
    prompt_tokens,
    ragged_rows,
    randomize,
)

NAMES = ["harmless.a", "harmless.b"]
FAMILY = Family(
    units={"harmless": 0.5},
    rank=LORA.r,
    low=dict.fromkeys(NAMES, 0.2),
    high=dict.fromkeys(NAMES, 1.5),
    shared=dict.fromkeys(NAMES, "harmless"),
)
LAMBDA = pd.Series({"harmless.a": 0.2, "harmless.b": 0.9})
IDS = list(PROMPT_TABLE["prompt_id"])
KINDS = dict(zip(IDS, ["a", "a", "a", "b", "b", "b", "ab", ""], strict=True))


def by_category(pool: pd.DataFrame) -> pd.DataFrame:
    """The pool with the utility's columns by category."""
    kinds = pool["prompt_id"].map(KINDS)
    columns = {f"harmless.{k}": pool["harmless"].where(kinds.str.contains(k)) for k in "ab"}
    return pool.assign(**columns)


def label(pool: pd.DataFrame) -> pd.DataFrame:
    law = MultiplierRange(pd.Series(0.5, index=NAMES), pd.Series(0.01, index=NAMES), 3.0)
    sizes = {"group_size": 4, "groups_per_prompt": 6}
    return label_groups(by_category(pool), "helpful", law, **sizes, seed=0)


def save_gated(policy, pool: pd.DataFrame, folder: Path, lora: LoraSettings = LORA) -> Path:
    """A family that is far from π_ref, as a fit saves it."""
    plan = FitPlan(fit_settings(), lora, 0.25, 0, output=folder / "family", family=FAMILY)
    rows = gated_rows(ragged_rows(policy, 4, 0), make_family("harmless"))
    with built_trainer(policy, rows, folder / "trainer", family=FAMILY, lora=lora) as trainer:
        randomize(trainer, 0.15)
        contexts = label_contexts(label(pool), pool, prompt_tokens(policy), FAMILY)
        save_adapter(trainer.model, None, "{}", folder / ".family.tmp", plan, contexts)
    return plan.output


@pytest.fixture(scope="module")
def pool(plain_policy):
    return make_pool(plain_policy)


@pytest.fixture(scope="module")
def family(plain_policy, pool, tmp_path_factory):
    return save_gated(plain_policy, pool, tmp_path_factory.mktemp("family"))


def settings(**changes):
    steps = changes.pop("steps", 120)
    changes = {"learning_rate": 1e-3, "group_size": 4, "batch_size": 8} | changes
    return fit_settings(conditional=ConditionalSettings(distill_steps=steps), **changes)


def laws(policy, adapter: Path) -> np.ndarray:
    return exact_logps(policy, adapter, prompt_tokens(policy), 3)


def copied(family: Path, folder: Path) -> Path:
    return Path(shutil.copytree(family, folder))


def weights_of(adapter: Path) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def test_a_prompt_s_gate_is_the_sum_of_its_categories(family):
    table = pd.DataFrame({"harmless.a": [0.2, np.nan, 0.3, np.nan], "harmless.b": 0.5})
    table.loc[[0, 3], "harmless.b"] = np.nan
    expected = [[2.0, 0.8], [1.0, 1.0], [1.0, 1.6], [1.0, 0.0]]
    np.testing.assert_allclose(FAMILY.gates(table, np.array([2.0, 1, 1, 1])), expected)
    assert FAMILY.num_blocks == 2 and read_family(family) == FAMILY
    contexts = read_contexts(family)
    assert contexts.groupby("prompt_id")["response_ids"].size().between(8, 12).all()
    gates = context_gates(contexts, FAMILY, LAMBDA, 1.0)
    by_kind = {"a": 0.4, "b": 1.8, "ab": 2.2, "": 0.0}
    np.testing.assert_allclose(gates[:, 1], contexts["prompt_id"].map(KINDS).map(by_kind))


def divergences(policy, family: Path, folder: Path, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """KL(teacher ‖ student) of each prompt, all answers listed, before and after the distillation;
    the teacher's law of a prompt is that of the ordinary adapter with its gates."""
    distill_member(policy, family, LAMBDA, 1.0, settings(steps=steps), 3, folder / "member")
    gates = {"a": 0.4, "b": 1.8, "ab": 2.2, "": 0.0}
    teacher = np.empty_like(laws(policy, folder / "member"))
    for kind, gate in gates.items():
        one = folder / f"gate-{gate}"
        write_adapter(family, scaled_weights(family, np.array([1.0, gate])), one)
        rows = [KINDS[pid] == kind for pid in IDS]
        teacher[rows] = laws(policy, one)[rows]
    mean = np.array([1.0, np.mean([gates[kind] for kind in KINDS.values()])])
    write_adapter(family, scaled_weights(family, mean), folder / "start")

    def divergence(adapter: str) -> np.ndarray:
        student = laws(policy, folder / adapter)
        return np.asarray((np.exp(teacher) * (teacher - student)).sum(axis=1))

    return divergence("start"), divergence("member")


def test_one_adapter_has_every_category_s_law(plain_policy, family, tmp_path):
    start, end = divergences(plain_policy, family, tmp_path, 60)
    assert start.mean() > 0.2 and end.mean() < 0.2 * start.mean(), (start, end)
    assert end.max() < 0.2 * start.max()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_with_an_adapted_head_at_a_temperature_and_on_a_quantized_base(quantization, tmp_path):
    policy = load_policy(
        PolicySettings(model=str(build_policy()), quantization=quantization, temperature=0.7)
    )
    lora = LORA.model_copy(update={"target_modules": ["q_proj", "down_proj", "lm_head"]})
    family = save_gated(policy, make_pool(policy), tmp_path, lora)
    start, end = divergences(policy, family, tmp_path, 120)
    assert start.mean() > 0.1 and end.mean() < 0.5 * start.mean(), (start, end)


def test_equal_gates_need_no_fit(plain_policy, family, tmp_path):
    contexts = read_contexts(family)
    kept = contexts[contexts["prompt_id"].map(KINDS).isin(["a", "b"])]
    other = copied(family, tmp_path / "family")
    kept.reset_index(drop=True).to_parquet(other / "contexts.parquet")
    same = pd.Series(0.6, index=NAMES)
    distill_member(plain_policy, other, same, 0.5, settings(), 3, tmp_path / "member")
    expected = scaled_weights(family, 0.5 * np.array([1.0, 1.2]))
    for name, value in weights_of(tmp_path / "member").items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("way", ["alike", "checkpoints", "pieces"])
def test_the_same_family_and_seed_give_the_same_adapter(
    plain_policy, family, tmp_path, monkeypatch, way
):
    """Whatever a forward holds, with dropout in the family's config, and under checkpoints."""
    before = {n: p.clone() for n, p in plain_policy.model.state_dict().items()}
    few = settings(steps=6)
    distill_member(plain_policy, family, LAMBDA, 1.0, few, 3, tmp_path / "first")
    distill_member(plain_policy, family, LAMBDA, 1.0, few, 4, tmp_path / "other")
    other, tolerance = copied(family, tmp_path / "family"), 0.0
    if way == "checkpoints":
        few, tolerance = settings(steps=6, gradient_checkpointing=True), 1e-5
        sealed = json.loads((other / "family.json").read_text())
        sealed["adapter_config"]["lora_dropout"] = 0.1
        (other / "family.json").write_text(json.dumps(sealed))
    if way == "pieces":
        tolerance = 1e-4
        monkeypatch.setattr(distill, "LOGITS_IN_FORWARD", 30 * 4 * 5)  # five rows of answers
        monkeypatch.setattr(distill, "LOGITS_AT_ONCE", 30 * 2)
    distill_member(plain_policy, other, LAMBDA, 1.0, few, 3, tmp_path / "again")
    first, again = weights_of(tmp_path / "first"), weights_of(tmp_path / "again")
    for name, value in first.items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=tolerance)
    assert any(
        (value != first[name]).any() for name, value in weights_of(tmp_path / "other").items()
    )
    after = plain_policy.model.state_dict()
    assert after.keys() == before.keys() and all((after[n] == p).all() for n, p in before.items())
    assert not any(p.requires_grad for p in plain_policy.model.parameters())
    assert not list(tmp_path.glob(".*"))


def test_where_a_launch_shards_fits_the_base_is_as_it_was(
    plain_policy, family, tmp_path, monkeypatch
):
    names = list(plain_policy.model.state_dict())
    with monkeypatch.context() as patch:
        variables = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
        for name, value in (variables | {"ACCELERATE_USE_FSDP": "true"}).items():
            patch.setenv(name, value)
        assert shards_base()
        distill_member(plain_policy, family, LAMBDA, 1.0, settings(steps=1), 3, tmp_path / "one")
    assert list(plain_policy.model.state_dict()) == names
    assert not hasattr(plain_policy.model, "peft_config")


def test_a_block_serves_all_categories_of_a_utility_and_measure():
    tail = Measure("tail", 0.05)
    harmless = {"utility": "harmless", "by": "kind", "margin": 1.0}
    constraints = [
        Constraint("short", margin=1.0),
        *(Constraint(f"harmless.{k}", **harmless, categories=frozenset(k)) for k in "ab"),
        Constraint("harmless.a.tail", **harmless, categories=frozenset("a"), measure=tail),
        Constraint("short.tail", margin=1.0, measure=tail),
    ]
    names = [c.name for c in constraints]
    units = pd.Series([1.0, 0.2, 0.4, 0.5, 2.0], index=names)
    law = MultiplierRange(units, units / 10, 3.0)
    family = family_for(constraints, units, law, rank=4)
    assert list(family.units) == ["short", "harmless", "harmless.tail", "short.tail"]
    assert family.units == {
        "short": 1,
        "harmless": approx(0.3),
        "harmless.tail": 0.5,
        "short.tail": 2,
    }
    assert family.shared == dict.fromkeys(NAMES, "harmless") | {"harmless.a.tail": "harmless.tail"}
    table = pd.DataFrame([[1.0, np.nan, 0.6, np.nan, 4.0]], columns=names)
    np.testing.assert_allclose(family.gates(table), [[1.0, 1.0, 2.0, 0.0, 2.0]])
    with pytest.raises(ValueError, match=r"a multiplier of short, short\.tail is null"):
        family.gates(table.assign(short=np.nan))


def test_of_pairs_both_sides_are_kept():
    prompts = [f"p{i}" for i in range(3000)]
    labels = pd.DataFrame({"prompt_id": prompts, **{f"lambda/{name}": 0.5 for name in NAMES}})
    sides = {side: [f"{p}/{side}" for p in prompts] for side in ("chosen", "rejected")}
    labels = labels.assign(chosen_id=sides["chosen"], rejected_id=sides["rejected"])
    ids = sides["chosen"] + sides["rejected"]
    pool = pd.DataFrame({"response_id": ids, "token_ids": [np.array([1])] * len(ids)})
    pool["token_ids"] = [np.array([int(name.endswith("chosen"))]) for name in ids]
    doubled = pd.concat([labels, labels.assign(prompt_id=labels["prompt_id"] + "'")])
    tokens = {p: [3] for p in doubled["prompt_id"]}
    kept = label_contexts(doubled.reset_index(drop=True), pool, tokens, FAMILY)
    share = np.mean([ids[0] for ids in kept["response_ids"]])
    assert abs(share - 0.5) < 0.05


def test_of_many_prompts_few_responses_are_kept():
    prompts = np.repeat([f"p{i}" for i in range(5000)], 4)
    ids = [f"r{i}" for i in range(len(prompts))]
    labels = pd.DataFrame({"prompt_id": prompts, "response_id": ids})
    labels = labels.assign(**{f"lambda/{name}": 0.5 for name in NAMES})
    tokens = pd.Series([np.array([1, 2], np.int32)] * len(ids), dtype=object)
    pool = pd.DataFrame({"response_id": ids, "token_ids": tokens})
    kept = label_contexts(labels, pool, {p: [3] for p in prompts}, FAMILY)
    assert len(kept) == kept["prompt_id"].nunique() == 5000


def test_a_fit_by_category_has_one_block_and_keeps_its_contexts(plain_policy, pool, tmp_path):
    labels = label(pool)
    fit_log(plain_policy, pool, tmp_path, labels=labels, plan={"family": FAMILY}, group_size=4)
    folder = tmp_path / "adapter"
    kept = read_contexts(folder)
    assert set(kept["prompt_id"]) == set(IDS) and len(kept) == labels["response_id"].nunique()
    by_id = kept.drop_duplicates("prompt_id").set_index("prompt_id")["concerns"]
    assert {p: "".join(n[-1] for n in names) for p, names in by_id.items()} == KINDS
    with pytest.raises(ValueError, match="share a block"):
        write_member(folder, LAMBDA, 1.0, tmp_path / "member")
    (folder / "contexts.parquet").unlink()
    with pytest.raises(UserError, match=r"contexts\.parquet"):
        distill_member(plain_policy, folder, LAMBDA, 1.0, settings(), 3, tmp_path / "member")
