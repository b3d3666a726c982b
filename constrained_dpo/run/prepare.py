"""Everything before round 0: π_ref's scored responses, margins, step scale, λ_0."""

import shutil
from typing import Any

import pandas as pd

from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.launch import is_main, wait
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.dataset_answers import (
    answer_counts,
    collect_answers,
    tokenized_answers,
)
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.problem import by_name
from constrained_dpo.progress import timed
from constrained_dpo.recipe.defaults import sized, split_counts
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.first_multipliers import initial_multipliers, initial_tail_points
from constrained_dpo.run.multipliers import resolve_margins, resolve_step_scale
from constrained_dpo.run.scorer_facts import scorer_facts
from data_prep.errors import UserError
from data_prep.files import hash_file, write_json
from data_prep.prompts.preference_rows import given_pairs
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.tables import PROMPTS, TOKEN_IDS


def prepare(
    run: RunDirectory, recipe: Recipe, learner: Learner, left_out: dict[str, int]
) -> Recipe:
    """Sample and score π_ref, find margins, the step's scale and λ_0; return the resolved recipe.

    left_out: counts of prompts left out, for state.json. Raises UserError for a score that is
    constant on the reference pool.
    """
    recipe = sized(recipe, split_counts(learner.prompts))
    if is_main():
        _keep_prompts(run, recipe, learner)
        if recipe.category_columns:
            run.write_recipe(recipe)
    wait()
    _take_kept_tokens(run, learner)
    identity: dict[str, Any] = {}
    timed("prepare: load policy and scorers", lambda: identity.update(learner.identity()))
    _require_inherited(run, identity)
    if recipe.pool.source != "dataset" and not run.pool_file(None).exists():
        phase = "prepare: sample and score π_ref on fit prompts"
        timed(phase, lambda: _sample_pool(run, recipe, learner))
    if not run.reference_file.exists():
        phase = "prepare: sample and score π_ref on dual and test prompts"
        timed(phase, lambda: _sample_reference(run, recipe, learner))
    if recipe.pool.source != "reference" and not run.dataset_pool_file.exists():
        if not isinstance(learner, LoraLearner):
            raise UserError("pool.source: only a language model's pool takes a dataset's responses")
        phase, dataset_learner = "prepare: read and score the dataset's responses", learner
        timed(phase, lambda: _prepare_dataset_pool(run, dataset_learner))
    learner.sampling_cost()  # says it
    wait()
    begun: list[Recipe] = []

    def begin() -> None:
        begun.append(_begin(run, recipe, learner, identity, left_out))

    if is_main():
        timed("prepare: margins, scale and λ_0", begin)
    wait()
    return begun[0] if begun else run.recipe()


def _keep_prompts(run: RunDirectory, recipe: Recipe, learner: Learner) -> None:
    """Write the prompts with their token ids, once: a run's prompts stay as they are. Raises
    UserError where the source gives other prompts than those kept."""
    prompts = learner.prompts.reset_index(drop=True)
    if run.prompts_file.exists():
        kept = read_parquet(run.prompts_file)
        columns = recipe.category_columns
        missing = [column for column in columns if column not in kept]
        shared = [column for column in columns if column in kept]
        if not _comparable(kept, shared).equals(_comparable(prompts, shared)):
            raise UserError(
                f"{run.prompts_file}: the prompt source changed while the run was being prepared; "
                "restore it or start another run"
            )
        if missing:  # taken over from a run without these categories
            write_parquet(kept.assign(**prompts[missing]), run.prompts_file)
        if TOKEN_IDS in kept:
            return
    if isinstance(learner, LoraLearner):
        learner.keep_tokens()
        prompts = learner.prompts.reset_index(drop=True)
    write_parquet(prompts, run.prompts_file)


def _comparable(prompts: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The prompts with their categories as tuples, without anything else."""
    table = prompts[[*PROMPTS, *columns]]
    return table.assign(**{column: table[column].map(tuple) for column in columns})


def _take_kept_tokens(run: RunDirectory, learner: Learner) -> None:
    """Go on with the token ids that were kept, by whichever process and whenever."""
    kept = read_parquet(run.prompts_file)
    if isinstance(learner, LoraLearner) and TOKEN_IDS in kept:
        learner.prompts = kept
        learner.__dict__.pop("prompt_tokens", None)


def _require_inherited(run: RunDirectory, identity: dict[str, Any]) -> None:
    inherited = run.state().inherited or {}
    for key in inherited.keys() & {"policy", "law"}:
        if identity[key] != inherited[key]:
            raise UserError(
                f"{run.path}: {key} is not that of {inherited['from']}, whose responses it takes "
                "over; init it without --from"
            )


def _reference_samples(
    run: RunDirectory, recipe: Recipe, learner: Learner, phase: str, count: int
) -> pd.DataFrame:
    """π_ref's scored responses to the prompts of a phase: pool (fit and dual) or reference (dual
    and test)."""
    prompts, without = learner.prompts, "test" if phase == "pool" else "fit"
    job = Collection(
        phase=phase,
        folder=run.shard_folder(phase),
        source=f"reference-{phase}",
        responses_per_prompt=count,
        shard_size=recipe.sampling.shard_size,
        objectives=recipe.problem.columns,
        seed=recipe.seed,
        rule=draw_rule(recipe),
        given=read_parquet(run.inherited_file(phase)) if run.state().inherited else None,
    )
    return collect(learner, prompts[prompts["split"] != without], job)


def _sample_pool(run: RunDirectory, recipe: Recipe, learner: Learner) -> None:
    count = recipe.sampling.responses_per_prompt
    pool = _reference_samples(run, recipe, learner, "pool", count)
    _require_varying(pool, recipe.problem.columns)
    if is_main():
        write_parquet(pool, run.pool_file(None))


def _sample_reference(run: RunDirectory, recipe: Recipe, learner: Learner) -> None:
    count = recipe.dual.reference_responses
    reference = _reference_samples(run, recipe, learner, "reference", count)
    if recipe.pool.source == "dataset":
        _require_varying(reference, recipe.problem.columns)
    if is_main():
        write_parquet(with_split(reference, learner.prompts), run.reference_file)


def _prepare_dataset_pool(run: RunDirectory, learner: LoraLearner) -> None:
    """Writes pool/dataset.parquet, and before it its labels (pool/given.parquet) and counts
    (pool/dataset.json)."""
    column, inherited = learner.recipe.fit.label_column, run.inherited_file("dataset")
    answers, table = tokenized_answers(learner, label=column)
    pairs = None if column is None else given_pairs(answers)
    given = read_parquet(inherited) if inherited.exists() else None
    if given is not None and set(given["response_id"]) != set(table["response_id"]):
        raise UserError(
            f"{run.path}: the dataset's responses are not those of the run it takes over; restore "
            "them, or init without --from"
        )
    folder = run.shard_folder("dataset")
    pool = collect_answers(learner, table, folder, phase="dataset", scored=True, given=given)
    if is_main():
        num_prompts = int((learner.prompts["split"] != "test").sum())
        if pairs is not None:
            write_parquet(pairs, run.given_pairs_file)
        write_json(run.dataset_record_file, answer_counts(table, num_prompts, answers.left_out))
        write_parquet(pool, run.dataset_pool_file)


def _begin(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    identity: dict[str, Any],
    left_out: dict[str, int],
) -> Recipe:
    """The end of `prepare`, from π_ref's scored responses: margins, what is known of the scorers,
    exact optimum, step scale, λ_0, state. Returns the resolved recipe."""
    recipe = resolve_margins(run, recipe)
    if not run.scorers_file.exists():
        pool = _reference_responses(run, recipe)
        facts = scorer_facts(recipe, pool, learner.measured_scorers(pool))
        write_json(run.scorers_file, {name: fact.to_json() for name, fact in facts.items()})
    if learner.exact is not None and not run.exact_file.exists():
        optimum = learner.exact.optimum(recipe.problem)
        write_json(run.exact_file, {split: best.to_json() for split, best in optimum.items()})
    points = initial_tail_points(run, recipe)
    recipe = resolve_step_scale(run, recipe.at_tail_points(points))
    state = run.state()
    if not state.prepared:
        drop_shards(run, "pool", "reference", "dataset")
        measured = {
            "hashes": {**identity, "prompts": hash_file(run.prompts_file)[:16]},
            "left_out": left_out,
            "lambda_": [by_name(initial_multipliers(run, recipe))],
            "tail_points": [points],
        }
        run.write_state(state.model_copy(update=measured))
    return recipe


def _reference_responses(run: RunDirectory, recipe: Recipe) -> pd.DataFrame:
    """π_ref's scored responses in the pool; where a dataset's make the pool, those on the dual
    prompts."""
    if recipe.pool.source != "dataset":
        return read_parquet(run.pool_file(None))
    reference = read_parquet(run.reference_file)
    return reference[reference["split"] == "dual"]


def drop_shards(run: RunDirectory, *phases: str) -> None:
    """Drop the shards that whole tables were made of.

    Before the state is written, so that a kill in between only repeats it.
    """
    for phase in phases:
        shutil.rmtree(run.shard_folder(phase), ignore_errors=True)


def with_split(responses: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """Add the column split, each response's prompt's."""
    split = prompts.set_index("prompt_id")["split"]
    return responses.assign(split=responses["prompt_id"].map(split))


def _require_varying(pool: pd.DataFrame, objectives: list[str]) -> None:
    for name in objectives:
        if pool[name].nunique() < 2:
            raise UserError(
                f"scorer of {name}: gives {pool[name].iloc[0]} to all {len(pool)} reference "
                "responses; it cannot tell responses apart"
            )


def require_same_inputs(run: RunDirectory, learner: Learner) -> None:
    """Require policy, scorers, sampling law and prompts to be those the run was prepared with.

    Raises UserError naming what changed.
    """
    current: dict[str, Any] = {**learner.identity(), "prompts": hash_file(run.prompts_file)[:16]}
    for key, value in run.state().hashes.items():
        now = current.get(key)
        if now == value:
            continue
        if key == "scorers" and (odd := [n for n in value if (now or {}).get(n) != value[n]]):
            raise UserError(
                f"{run.path}: the scorer of {', '.join(odd)} changed since `prepare` (its file or "
                "its model); restore it, or start another run"
            )
        raise UserError(
            f"{run.path}: {key} changed since `prepare` ({value} then, {now} now); restore it or "
            "start another run"
        )
