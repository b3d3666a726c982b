"""Everything before round 0: π_ref's scored responses, margins, step scale, λ_0."""

import shutil

import pandas as pd

from constrained_dpo.launch import is_main, wait
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.dataset_answers import prepare_dataset_pool
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.progress import Announce, silent, timed
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.scorer_facts import scorer_facts
from constrained_dpo.run.steering import initial_multipliers, resolve_margins, resolve_step_scale
from data_prep.errors import UserError
from data_prep.files import hash_file, write_json
from data_prep.tables import read_parquet, write_parquet


def prepare(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    left_out: dict[str, int],
    announce: Announce = silent,
) -> Recipe:
    """Everything before round 0: prompts, π_ref's scored responses, ḡ_ref, the step's scale, λ_0.
    Returns the resolved recipe.

    left_out: counts of prompts left out, for state.json. Raises UserError for a score that is
    constant on the reference pool.
    """
    problem, sampling, dual = recipe.problem, recipe.sampling, recipe.dual
    prompts = learner.prompts
    if is_main():
        _keep_prompts(run, prompts)
    wait()
    identity: dict[str, object] = {}
    timed(announce, "prepare: load policy and scorers", lambda: identity.update(learner.identity()))
    inherited = run.state().get("inherited", {})
    for key in ("policy", "law"):
        if inherited and identity[key] != inherited[key]:
            raise UserError(
                f"{run.path}: {key} is not that of {inherited['from']}, whose responses it takes "
                "over; init it without --from"
            )

    def reference_samples(phase: str, chosen: pd.DataFrame, count: int) -> pd.DataFrame:
        return collect(
            run,
            learner,
            chosen,
            phase=phase,
            round_number=0,
            responses_per_prompt=count,
            adapter=None,
            source=f"reference-{phase}",
            shard_size=sampling.shard_size,
            objectives=problem.objectives,
            seed=recipe.seed,
            known=read_parquet(run.inherited_file(phase)) if inherited else None,
        )

    def sample_pool() -> None:
        pool = reference_samples(
            "pool", prompts[prompts["split"] != "test"], sampling.responses_per_prompt
        )
        _require_varying(pool, problem.objectives)
        if is_main():
            write_parquet(pool, run.pool_file(None))

    def sample_reference() -> None:
        reference = reference_samples(
            "reference", prompts[prompts["split"] != "fit"], dual.responses_per_prompt
        )
        if recipe.pool.source == "dataset":
            _require_varying(reference, problem.objectives)
        if is_main():
            write_parquet(_with_split(reference, prompts), run.reference_file)

    if recipe.pool.source != "dataset" and not run.pool_file(None).exists():
        timed(announce, "prepare: sample and score π_ref on fit prompts", sample_pool)
    if not run.reference_file.exists():
        timed(
            announce, "prepare: sample and score π_ref on dual and test prompts", sample_reference
        )
    if recipe.pool.source != "reference" and not run.dataset_pool_file.exists():
        timed(
            announce,
            "prepare: read and score the dataset's responses",
            lambda: prepare_dataset_pool(run, learner),
        )
    wait()
    if is_main():
        recipe = _begin(run, recipe, learner, identity, left_out)
    wait()
    return recipe if is_main() else run.recipe()


def _keep_prompts(run: RunDirectory, prompts: pd.DataFrame) -> None:
    if not run.prompts_file.exists():
        write_parquet(prompts, run.prompts_file)
    elif not read_parquet(run.prompts_file).equals(prompts.reset_index(drop=True)):
        raise UserError(
            f"{run.prompts_file}: the prompt source changed while the run was being prepared; "
            "restore it or start another run"
        )


def _begin(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    identity: dict[str, object],
    left_out: dict[str, int],
) -> Recipe:
    """The end of `prepare`, from π_ref's scored responses: margins, what is known of the scorers,
    exact optimum, step scale, λ_0, state. Returns the resolved recipe."""
    recipe = resolve_margins(run, recipe)
    if not run.scorers_file.exists():
        pool = _own_responses(run, recipe)
        write_json(run.scorers_file, scorer_facts(recipe, pool, learner.measured_scorers(pool)))
    optimum = learner.optimum()
    if optimum is not None and not run.exact_file.exists():
        write_json(run.exact_file, optimum)
    recipe = resolve_step_scale(run, recipe)
    state = run.state()
    if not state["lambda"]:
        state |= {
            "hashes": {**identity, "prompts": hash_file(run.prompts_file)[:16]},
            "left_out": left_out,
            "lambda": [initial_multipliers(run, recipe).to_dict()],
        }
        _drop_shards(run, "pool", "reference", "dataset")
        run.write_state(state)
    return recipe


def _own_responses(run: RunDirectory, recipe: Recipe) -> pd.DataFrame:
    """π_ref's scored responses in the pool; where a dataset's make the pool, those on the dual
    prompts."""
    if recipe.pool.source != "dataset":
        return read_parquet(run.pool_file(None))
    reference = read_parquet(run.reference_file)
    return reference[reference["split"] == "dual"]


def _drop_shards(run: RunDirectory, *phases: str) -> None:
    """Drops the shards that whole tables were made of; before the state is written, so that a kill
    in between only repeats it."""
    for phase in phases:
        shutil.rmtree(run.shard_folder(phase), ignore_errors=True)


def _with_split(responses: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    return responses.assign(
        split=responses["prompt_id"].map(prompts.set_index("prompt_id")["split"])
    )


def _require_varying(pool: pd.DataFrame, objectives: list[str]) -> None:
    for name in objectives:
        if pool[name].nunique() < 2:
            value = pool[name].iloc[0]
            raise UserError(
                f"scorer of {name}: gives {value} to all {len(pool)} reference responses; it "
                "cannot tell responses apart"
            )


def require_same_inputs(run: RunDirectory, learner: Learner) -> None:
    """Raises UserError when policy, scorers, sampling law or prompts are not those the run was
    prepared with."""
    hashes = run.state()["hashes"]
    current = {**learner.identity(), "prompts": hash_file(run.prompts_file)[:16]}
    for key, value in hashes.items():
        now = current.get(key)
        if now != value:
            if key == "scorers" and (
                odd := [name for name in value if now.get(name) != value[name]]
            ):
                raise UserError(
                    f"{run.path}: the scorer of {', '.join(odd)} changed since `prepare` (its "
                    "file or its model); restore it, or start "
                    "another run"
                )
            raise UserError(
                f"{run.path}: {key} changed since `prepare` ({value} then, {current.get(key)} "
                "now); restore it or start another run"
            )
