"""A new run directory from a recipe; what it takes over from a prepared run (`init --from`)."""

import sqlite3
from contextlib import closing
from pathlib import Path

from constrained_dpo.recipe.defaults import sized, split_counts
from constrained_dpo.recipe.load import RecipeSource, read_document, recipe_text, validated
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory, RunState
from data_prep.errors import UserError
from data_prep.files import unwritable, write_atomically
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.tables import without_scores


def init_run(
    recipe_source: RecipeSource,
    path: Path,
    overrides: list[str],
    source: RunDirectory | None = None,
) -> RunDirectory:
    """Freezes a recipe into a new run directory; the same recipe again is no error. Raises
    UserError if another recipe's run is there.

    source: a prepared run whose π_ref responses and scores are taken over (another margin, β or set
    of constraints); UserError where its recipe differs in anything those responses depend on.
    """
    document = read_document(recipe_source, overrides)
    recipe = validated(recipe_source, document)
    # Without what another run measured, where that run's recipe.yaml is the recipe.
    recipe = recipe.as_given()
    run = RunDirectory(path)
    step_scale = recipe.model_dump(mode="json")["dual"]["step_scale"]
    if run.state_file.exists():
        state = run.state()
        if state.recipe_hash != recipe.hash() or state.asked_step_scale != step_scale:
            raise UserError(
                f"{path}: is a run of another recipe (or other -s settings); choose another run "
                "directory"
            )
        return run
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"{path}: cannot be written (it is a file); choose a run directory")
    if run.path.exists() and any(run.path.iterdir()) and not run.recipe_file.exists():
        raise UserError(f"{path}: exists and is not a run directory; choose an empty or new folder")
    state = RunState(
        recipe_hash=recipe.hash(),
        asked_step_scale=step_scale,
        lambda_=[],
        hashes={},
        left_out={},
        inherited=None if source is None else _inheritance(recipe, source),
    )
    try:
        write_atomically(run.recipe_file, recipe_text(recipe, document).encode())
        if source is not None:
            _take_over(run, source)
        run.write_state(state)
    except OSError as error:
        raise unwritable(run.path, error) from error
    return run


# What π_ref's stored responses depend on. The adapter's shape does not enter: π_ref has none.
_SAMPLED_WITH = (
    "seed",
    "policy",
    "prompts",
    "sampling",
    "dual.prompts_per_round",
    "dual.responses_per_prompt",
    "dual.reference_responses",
    "fit.max_length",
    "pool.source",
)


def _inheritance(recipe: Recipe, source: RunDirectory) -> dict[str, str]:
    """Path and hashes of the run that is taken over; raises UserError when it is not prepared or
    was sampled otherwise. A level's number of samples that the recipe leaves open is the source's.
    """
    state = source.state()
    if not state.prepared:
        raise UserError(
            f"--from {source.path}: is not prepared yet; run `cdpo prepare {source.path}` first"
        )
    there_recipe, here_recipe = source.recipe(), sized(recipe, split_counts(source.prompts()))
    there_content, here_content = (r.model_dump(mode="json") for r in (there_recipe, here_recipe))
    if not recipe.dual.reference_responses:
        here_content["dual"]["reference_responses"] = there_recipe.dual.reference_responses
    for content in (there_content, here_content):
        del content["policy"]["lora"]
    for key in _SAMPLED_WITH:
        block, _, name = key.partition(".")
        here, there = (
            content[block][name] if name else content[block]
            for content in (here_content, there_content)
        )
        if here != there:
            if isinstance(here, dict):
                differing = next(k for k in here if here[k] != there.get(k))
                key = f"{key}.{differing}"
                here, there = here[differing], there.get(differing)
            raise UserError(
                f"--from {source.path}: {key} differs ({there} there, {here} here), so its "
                "responses cannot be used again"
            )
    return {
        "from": str(source.path.resolve()),
        "policy": state.hashes["policy"],
        "law": state.hashes["law"],
    }


def _take_over(run: RunDirectory, source: RunDirectory) -> None:
    """Copies prompts, π_ref's responses without their scores, and the cache that knows the
    scores."""
    write_parquet(source.prompts(), run.prompts_file)
    tables = {
        "pool": source.pool_file(None),
        "dataset": source.dataset_pool_file,
        "reference": source.reference_file,
    }
    for phase, file in tables.items():
        if file.exists():
            write_parquet(without_scores(read_parquet(file)), run.inherited_file(phase))
    if source.score_cache.exists():
        with (
            closing(sqlite3.connect(source.score_cache)) as their_cache,
            closing(sqlite3.connect(run.score_cache)) as our_cache,
        ):
            their_cache.backup(our_cache)
