"""`cdpo evaluate`: fresh samples of a round's policy, or of an adapter from elsewhere on the same
base, on the test prompts or on another prompt file, by the run's scorers and extra ones."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.estimates.intervals import spent_confidence
from constrained_dpo.estimates.measure import Rule, measure
from constrained_dpo.estimates.sampling_law import why_not_the_policy
from constrained_dpo.estimates.slack import bounded_constraints, changes, prompt_slack, slack_bounds
from constrained_dpo.evaluation.record import Evaluation
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.multipliers import seen_slack
from constrained_dpo.run.steering import chosen_round
from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.models.adapters import (
    attached_adapter,
    check_adapter_config,
    check_all_loaded,
    fingerprint_adapter,
)
from data_prep.models.checkpoints import check_adapter_folder, fingerprint_model
from data_prep.models.policy import resolve_model
from data_prep.prompts.split import read_prompt_table
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.scorers.settings import ScorerSettings
from data_prep.tables import RESERVED_NAMES, validate_prompts, without_scores

ADAPTER_OPTION = "--adapter"


def evaluation_prompts(
    run: RunDirectory, recipe: Recipe, source: Path | None, columns: Sequence[str]
) -> tuple[pd.DataFrame, int]:
    """The run's test prompts, or those of another file (same layouts and format as in the recipe),
    all with split test; and how many duplicates of the file were left out. columns: of categories
    that the file must have."""
    if source is None:
        prompts = run.prompts()
        return prompts[prompts["split"] == "test"].reset_index(drop=True), 0
    table, duplicates = read_prompt_table(str(source), recipe.prompts.format, columns)
    table = table.rename_axis("prompt_id").reset_index().assign(split="test")
    return validate_prompts(table, str(source), columns), duplicates


def check_names(extra: list[str], recipe: Recipe) -> None:
    """Raises UserError for an extra scorer's name that is reserved or an objective's already."""
    for name in extra:
        if name in RESERVED_NAMES or name in recipe.scorers:
            raise UserError(
                f"--scorer {name}: is a reserved or already used column name; choose another"
            )


@dataclass(frozen=True)
class Draws:
    """How an evaluation samples.

    label: of the prompts, for names; another seed draws others; more: add as many fresh responses
    to an earlier evaluation of the same question, as one more look at it.
    """

    label: str
    responses_per_prompt: int
    seed: int = 0
    more: bool = False


def evaluate_round(
    run: RunDirectory, recipe: Recipe, learner: LoraLearner, number: int, draws: Draws
) -> Evaluation:
    """Evaluate a round's policy on the learner's prompts, as `_evaluate` does."""
    name = f"round-{number:03d}-{_slug(draws.label)}"
    return _evaluate(run, recipe, learner, run.adapter_folder(number), number, name, draws)


def evaluate_adapter(
    run: RunDirectory, recipe: Recipe, learner: LoraLearner, adapter: Path, draws: Draws
) -> Evaluation:
    """Evaluate a LoRA adapter from elsewhere (PEFT folder), trained on the run's π_ref somehow.

    It is attached to the run's base as the run quantizes it, and asked through the run's own prompt
    format and sampling law; a tokenizer in its folder is not used. Raises UserError for a folder
    that is no adapter, another base, or tensors that do not fit.
    """
    who = checked_adapter(run, recipe, learner, adapter)
    name = f"adapter-{_slug(adapter.resolve().name)}-{_slug(draws.label)}"
    record = _evaluate(run, recipe, learner, adapter, who, name, draws)
    return record.model_copy(update={"adapter": str(adapter)})


def round_or_adapter(run: RunDirectory, round_: str, adapter: Path | None) -> int | None:
    """Give the number of the round that is meant; None for an adapter.

    Raises UserError where both are named, and for a run that is not prepared.
    """
    if adapter is None:
        return chosen_round(run, round_)
    if round_ != "last":
        raise UserError(f"{ADAPTER_OPTION} and --round {round_}: give one of them")
    if not run.state().prepared:
        raise UserError(
            f"{run.path}: not prepared yet, so π_ref's responses are missing; `cdpo prepare "
            f"{run.path}` draws and scores them"
        )
    return None


def stored_reference(run: RunDirectory, prompts: pd.DataFrame) -> pd.DataFrame | None:
    """Give π_ref's responses of `prepare` without their scores; None unless it answered all of
    these prompts as test prompts."""
    stored = read_parquet(run.reference_file)
    rows = stored["prompt_id"].isin(prompts["prompt_id"]) & (stored["split"] == "test")
    stored = stored[rows].reset_index(drop=True)
    complete = set(stored["prompt_id"]) == set(prompts["prompt_id"])
    return without_scores(stored) if complete else None


def checked_adapter(run: RunDirectory, recipe: Recipe, learner: LoraLearner, adapter: Path) -> str:
    """Give the fingerprint of a LoRA adapter from elsewhere on the run's base.

    Raises UserError for a folder that is no adapter, another base, or tensors that do not fit.
    """
    base = resolve_model(recipe.policy)
    check_adapter_folder(adapter, ADAPTER_OPTION)
    advice = f"give it to a run of that base; {run.path} has another"
    fingerprint = fingerprint_model(base, recipe.policy.revision)
    check_adapter_config(adapter, base, fingerprint, ADAPTER_OPTION, advice)
    with attached_adapter(learner.policy, adapter) as model:
        check_all_loaded(model, adapter, base, ADAPTER_OPTION)
    return fingerprint_adapter(adapter)


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text)


def _evaluate(
    run: RunDirectory,
    recipe: Recipe,
    learner: LoraLearner,
    adapter: Path,
    who: int | str,
    name: str,
    draws: Draws,
) -> Evaluation:
    """Samples π_θ afresh on the learner's prompts, scores with all of the learner's scorers, and
    keeps tables and estimates.

    who: the round, or a fingerprint of the adapter. The reference policy's responses are the stored
    ones on the run's test prompts, and drawn as well on other prompts. The same arguments again
    give the stored result, unless they ask for more.
    """
    key = f"{name}-{_question_hash(recipe, learner, who, draws)}"
    file = run.evaluation_folder(key) / "evaluation.json"
    looks = Evaluation.read(file).looks if file.exists() else 0
    if draws.more and not looks:
        raise UserError(
            "--more: there is no such evaluation yet; run the same command without it first"
        )
    if looks and not draws.more:
        return Evaluation.read(file)
    prompts, look = learner.prompts, looks + 1
    suffix = f"-{look}" if looks else ""
    job = Collection(
        phase=f"{key}-policy{suffix}",
        folder=run.shard_folder(f"{key}-policy"),
        source=f"{key}-policy{suffix}",
        responses_per_prompt=draws.responses_per_prompt,
        shard_size=recipe.sampling.shard_size,
        objectives=list(learner.scorer_settings),
        seed=recipe.seed + draws.seed,
        rule=draw_rule(recipe),
        round_number=who if isinstance(who, int) else 0,
        adapter=adapter,
    )
    reference_job = replace(
        job,
        phase=f"{key}-reference{suffix}",
        folder=run.shard_folder(f"{key}-reference"),
        source=f"{key}-reference{suffix}",
        adapter=None,
        given=None if looks else stored_reference(run, prompts),
    )
    samples, reference = (collect(learner, prompts, j) for j in (job, reference_job))
    return write_evaluation(run, key, recipe, samples, reference, learner.scorer_settings, look)


def _question_hash(recipe: Recipe, learner: LoraLearner, who: int | str, draws: Draws) -> str:
    identity: list[object] = [
        who,
        learner.prompts["prompt_id"].tolist(),
        draws.responses_per_prompt,
        draws.seed,
        {name: scorer.fingerprint for name, scorer in learner.scorers.items()},
    ]
    # The recipe's own options are the run's; an extra scorer's are part of the question.
    extra = {n: s for n, s in learner.scorer_settings.items() if n not in recipe.scorers}
    if options := {name: words for name, s in extra.items() if (words := s.described())}:
        identity.append(options)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]


def write_evaluation(
    run: RunDirectory,
    key: str,
    recipe: Recipe,
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    scorers: dict[str, ScorerSettings],
    look: int = 1,
) -> Evaluation:
    """Estimate and judge from two scored tables on the same prompts, and keep them.

    look: 1, 2, ...; the tables of a later look join those of the earlier ones, and its verdict has
    the error probability that is left for it (`intervals.spent_confidence`). evaluation.json is
    written last. The shards KEY-policy and KEY-reference that the tables were made of are dropped
    before that, so that a kill in between only draws them again.
    """
    problem, confidence, folder = recipe.problem, recipe.dual.confidence, run.evaluation_folder(key)
    if look > 1:
        samples = _joined(folder / "samples.parquet", samples)
        reference = _joined(folder / "reference.parquet", reference)
    splits = run.prompts().set_index("prompt_id")["split"]
    trained = splits.reindex(samples["prompt_id"].unique()).isin(["fit", "dual"])
    ranges = recipe.score_ranges | {name: s.score_range for name, s in scorers.items()}
    seen = [*seen_slack(run, problem), prompt_slack(samples, reference, problem)]
    rule = Rule(
        confidence,
        spent_confidence(confidence, look),
        slack_bounds(problem, ranges, seen),
        bounded_constraints(problem, ranges),
    )
    reason = why_not_the_policy(recipe.sampling, samples, reference)
    measured = measure(samples, reference, problem, rule=rule, not_the_policy=reason)
    record = Evaluation(
        **measured.model_dump(),
        key=key,
        looks=look,
        trained_prompts=int(trained.sum()),
        verdict=measured.overall,
        change=changes(samples, reference, problem, confidence, ranges, list(scorers)),
    )
    write_parquet(samples, folder / "samples.parquet")
    write_parquet(reference, folder / "reference.parquet")
    for side in ("policy", "reference"):
        shutil.rmtree(run.shard_folder(f"{key}-{side}"), ignore_errors=True)
    write_json(folder / "evaluation.json", record.to_json())
    return record


def _joined(file: Path, fresh: pd.DataFrame) -> pd.DataFrame:
    """The stored responses and the fresh ones; those that a killed call stored already count
    once."""
    both = pd.concat([read_parquet(file), fresh], ignore_index=True)
    return both.drop_duplicates("response_id", ignore_index=True)
