"""`cdpo evaluate`: fresh samples of a round's policy, or of an adapter from elsewhere on the same
base, on the test prompts or on another prompt file, by the run's scorers and extra ones."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pandas as pd

from constrained_dpo.estimates.measure import summarize
from constrained_dpo.estimates.sampling_law import why_not_the_policy
from constrained_dpo.estimates.slack import changes, estimate_subgradient
from constrained_dpo.estimates.verdict import judge, overall
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
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
from data_prep.prompts.split import read_prompts
from data_prep.tables import (
    RESERVED_NAMES,
    read_parquet,
    validate_prompts,
    without_scores,
    write_parquet,
)

ADAPTER_OPTION = "--adapter"


def evaluation_prompts(
    run: RunDirectory, recipe: Recipe, source: Path | None
) -> tuple[pd.DataFrame, int]:
    """The run's test prompts, or those of another file (same layouts and format as in the recipe),
    all with split test; and how many duplicates of the file were left out."""
    if source is None:
        prompts = run.prompts()
        return prompts[prompts["split"] == "test"].reset_index(drop=True), 0
    series, duplicates = read_prompts(str(source), recipe.prompts.format)
    table = pd.DataFrame({"prompt_id": series.index, "prompt": series.to_numpy(), "split": "test"})
    return validate_prompts(table, str(source)), duplicates


def check_names(extra: list[str], problem: ConstrainedProblem) -> None:
    """Raises UserError for an extra scorer's name that is reserved or an objective's already."""
    for name in extra:
        if name in RESERVED_NAMES or name in problem.objectives:
            raise UserError(
                f"--scorer {name}: is a reserved or already used column name; choose another"
            )


def evaluate_round(
    run: RunDirectory,
    recipe: Recipe,
    learner: LoraLearner,
    number: int,
    *,
    label: str,
    responses_per_prompt: int,
    seed: int,
) -> dict[str, object]:
    """`_evaluate` of a round's policy."""
    return _evaluate(
        run,
        recipe,
        learner,
        run.adapter_folder(number),
        number,
        f"round-{number:03d}-{_slug(label)}",
        responses_per_prompt,
        seed,
    )


def evaluate_adapter(
    run: RunDirectory,
    recipe: Recipe,
    learner: LoraLearner,
    adapter: Path,
    *,
    label: str,
    responses_per_prompt: int,
    seed: int,
) -> dict[str, object]:
    """`_evaluate` of a LoRA adapter from elsewhere (PEFT folder), trained on the run's π_ref by
    whatever means.

    It is attached to the run's base as the run quantizes it, and asked through the run's own prompt
    format and sampling law; a tokenizer in its folder is not used. Raises UserError for a folder
    that is no adapter, another base, or tensors that do not fit.
    """
    base = resolve_model(recipe.policy)
    check_adapter_folder(adapter, ADAPTER_OPTION)
    advice = f"give it to a run of that base; {run.path} has another"
    check_adapter_config(
        adapter, base, fingerprint_model(base, recipe.policy.revision), ADAPTER_OPTION, advice
    )
    with attached_adapter(learner.policy, adapter) as model:
        check_all_loaded(model, adapter, base, ADAPTER_OPTION)
    key = f"adapter-{_slug(adapter.resolve().name)}-{_slug(label)}"
    record = _evaluate(
        run, recipe, learner, adapter, fingerprint_adapter(adapter), key, responses_per_prompt, seed
    )
    return record | {"adapter": str(adapter)}


def _slug(text: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "-", text)


def _evaluate(
    run: RunDirectory,
    recipe: Recipe,
    learner: LoraLearner,
    adapter: Path,
    who: int | str,
    name: str,
    responses_per_prompt: int,
    seed: int,
) -> dict[str, object]:
    """Samples π_θ afresh on the learner's prompts, scores with all of the learner's scorers, and
    keeps tables and estimates.

    who: the round, or a fingerprint of the adapter. The reference policy's responses are the stored
    ones on the run's test prompts, and drawn as well on other prompts. The same arguments again
    give the stored result; `seed` draws others. Returns the record of evaluation.json.
    """
    prompts, objectives = learner.prompts, list(learner.scorer_settings)
    identity = [
        who,
        prompts["prompt_id"].tolist(),
        responses_per_prompt,
        seed,
        {n: s.fingerprint for n, s in learner.scorers.items()},
    ]
    # The recipe's own options are the run's; an extra scorer's are part of the question.
    options = {
        n: said
        for n, s in learner.scorer_settings.items()
        if n not in recipe.scorers and (said := s.described())
    }
    if options:
        identity.append(options)
    key = f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"
    if (run.evaluation_folder(key) / "evaluation.json").exists():
        return json.loads((run.evaluation_folder(key) / "evaluation.json").read_text())
    stored = read_parquet(run.reference_file)
    stored = stored[stored["prompt_id"].isin(prompts["prompt_id"]) & (stored["split"] == "test")]
    known = (
        without_scores(stored) if set(stored["prompt_id"]) == set(prompts["prompt_id"]) else None
    )

    def draw(side: str, attached: Path | None, given: pd.DataFrame | None) -> pd.DataFrame:
        return collect(
            run,
            learner,
            prompts,
            phase=f"{key}-{side}",
            round_number=who if isinstance(who, int) else 0,
            responses_per_prompt=responses_per_prompt,
            adapter=attached,
            source=f"{key}-{side}",
            shard_size=recipe.sampling.shard_size,
            objectives=objectives,
            seed=recipe.seed + seed,
            known=given,
        )

    samples, reference = draw("policy", adapter, None), draw("reference", None, known)
    return write_evaluation(run, key, recipe, samples, reference, objectives)


def write_evaluation(
    run: RunDirectory,
    key: str,
    recipe: Recipe,
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    objectives: list[str],
) -> dict[str, object]:
    """Estimates and verdicts from two scored tables on the same prompts; commits the tables and
    evaluation.json, the latter last.

    Drops the shards KEY-policy and KEY-reference that they were made of before that, so that a kill
    in between only draws them again. `trained_prompts` counts prompts that the run was fitted on,
    which say nothing of unseen ones; `change` holds, for every objective and extra score, the means
    under both policies and the paired difference with its t-interval.
    """
    problem, confidence = recipe.problem, recipe.dual.confidence
    verdicts = judge(estimate_subgradient(samples, reference, problem, confidence), confidence)
    splits = run.prompts().set_index("prompt_id")["split"]
    trained = splits.reindex(samples["prompt_id"].unique()).isin(["fit", "dual"])
    reason = why_not_the_policy(recipe.sampling, samples, reference)
    record = {
        "key": key,
        "trained_prompts": int(trained.sum()),
        **summarize(samples, reference, problem, confidence=confidence, not_the_policy=reason),
        "verdicts": verdicts,
        "verdict": overall(verdicts),
        "change": changes(samples, reference, objectives, confidence),
    }
    folder = run.evaluation_folder(key)
    write_parquet(samples, folder / "samples.parquet")
    write_parquet(reference, folder / "reference.parquet")
    for who in ("policy", "reference"):
        shutil.rmtree(run.shard_folder(f"{key}-{who}"), ignore_errors=True)
    write_json(folder / "evaluation.json", record)
    return record
