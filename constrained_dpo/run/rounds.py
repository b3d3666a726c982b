"""One dual iteration: relabel → fit → re-score → dual step. Every phase is a file; a phase whose
file exists is done.

The learner is an argument: anything with fit, sample and score. `LoraLearner` trains a language
model; `TabularLearner` is the exact maximizer over an enumerated world.

Under `accelerate launch` every process plays the round: sampling, scoring and the fit are shared,
and what the main process alone writes is on disk before any goes on (`launch.wait`).
"""

import logging
from collections.abc import Callable

import pandas as pd

from constrained_dpo.launch import is_main, num_processes, summed, wait
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.protocol import FitJob, Learner
from constrained_dpo.progress import timed
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import drop_shards, with_split
from constrained_dpo.run.record import RoundRecord, RoundTables, round_record
from constrained_dpo.tracking import log_round
from data_prep.files import write_json
from data_prep.labels.groups import label_groups
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.labels.pool import choose_responses
from data_prep.labels.preferences import label_pairs
from data_prep.prompts.preference_rows import labelled
from data_prep.sampling.law import is_policy_law
from data_prep.settings import derive_seed
from data_prep.tables import read_parquet, validate_groups, validate_pairs, write_parquet

log = logging.getLogger(__name__)

OFF_POLICY_RESPONSES = 64
"""Responses of π_ref per dual prompt that a round's policy is asked about: enough for the residual,
and a bound on its cost."""


def play_round(run: RunDirectory, recipe: Recipe, learner: Learner) -> RoundRecord:
    """Play one dual iteration; return its record (round.json). Resume what a kill left undone."""
    state = run.state()
    number = state.rounds_done
    lambda_ = recipe.problem.multipliers(state.lambda_[-1])
    seconds: dict[str, float | None] = dict.fromkeys(("relabel", "fit", "rescore", "off_policy"))

    def phase(name: str, done: bool, action: Callable[[], None], shared: bool = False) -> None:
        """Does what is not done yet: in every process where the work is shared, else in the main
        one. All leave it together."""
        if not done and (shared or is_main()):
            seconds[name] = timed(f"round {number}: {name}", action)
        wait()

    labels, adapter = run.labels_file(number, recipe.fit.grouped), run.adapter_folder(number)
    samples, off_policy = run.samples_file(number), run.off_policy_file(number)
    phase("relabel", labels.exists(), lambda: _relabel(run, recipe, lambda_, number))
    unlabelled = _unlabelled(run, recipe, number) if is_main() else 0
    phase("fit", adapter.exists(), lambda: _fit(run, recipe, learner, lambda_, number), shared=True)
    phase("rescore", samples.exists(), lambda: _rescore(run, recipe, learner, number), shared=True)
    if is_policy_law(recipe.sampling):
        phase("off_policy", off_policy.exists(), lambda: _off_policy(run, learner, number))
    counts = {"truncated_scores": summed(learner.truncated()), "unlabelled_prompts": unlabelled}
    if is_main():
        _close_round(run, recipe, learner, {"seconds": seconds, **counts})
    wait()
    return RoundRecord.read(run.round_file(number))


def _close_round(
    run: RunDirectory, recipe: Recipe, learner: Learner, facts: dict[str, object]
) -> None:
    """The dual step and what a round leaves: the pool's growth, round.json, the trackers' point,
    λ_{t+1} in state.json. facts: fields of the record that no table holds."""
    state = run.state()
    number = state.rounds_done
    lambda_ = recipe.problem.multipliers(state.lambda_[-1])
    if recipe.pool.grow and not run.pool_file(number).exists():
        samples = read_parquet(run.samples_file(number))
        dual = samples[samples["split"] == "dual"].drop(columns="split")
        write_parquet(dual, run.pool_file(number))
    if not run.round_file(number).exists():
        record = round_record(RoundTables.read(run, number), recipe, lambda_)
        facts |= {"hashes": state.hashes, "processes": num_processes()}
        if learner.exact is not None:
            adapter = run.adapter_folder(number)
            facts["exact"] = learner.exact.policy(adapter, lambda_, recipe.problem)
        write_json(run.round_file(number), record.model_copy(update=facts).to_json())
    record = RoundRecord.read(run.round_file(number))
    log_round(
        run.logs_folder("rounds"),
        record.scalars(),
        step=number,
        report_to=recipe.fit.report_to,
        name=f"{recipe.name}-rounds",
        identity=f"{run.path.resolve()}/{recipe.hash()}",
    )
    drop_shards(run, _rescore_phase(number))
    run.write_state(state.model_copy(update={"lambda_": [*state.lambda_, record.lambda_next]}))


def _relabel(run: RunDirectory, recipe: Recipe, lambda_: pd.Series, number: int) -> None:
    fit, reward, seed = recipe.fit, recipe.problem.reward, recipe.seed
    where = f"labels of round {number}"
    if fit.labels == "given":
        pool = run.pool(0)
        score = pd.Series(lagrangian_score(pool, reward, lambda_), index=pool["response_id"])
        pairs = labelled(read_parquet(run.given_pairs_file), score)
        write_parquet(validate_pairs(pairs, where), run.pairs_file(number))
        return
    pool = choose_responses(
        run.pool(number),
        None if recipe.pool.shares is None else recipe.pool.shares.model_dump(),
        recipe.pool.max_per_prompt,
        reward=reward,
        lambda_=lambda_,
        beta=recipe.problem.beta,
        seed=seed,
        round_number=number,
    )
    if fit.grouped:
        sizes = {"group_size": fit.group_size, "groups_per_prompt": fit.groups_per_prompt}
        groups = label_groups(pool, reward, lambda_, **sizes, seed=seed, round_number=number)
        write_parquet(validate_groups(groups, where), run.groups_file(number))
        return
    pairs = label_pairs(
        pool,
        reward,
        lambda_,
        labels=fit.labels,
        pairs_per_prompt=None if fit.pairs_per_prompt == "all" else fit.pairs_per_prompt,
        seed=seed,
        round_number=number,
    )
    write_parquet(validate_pairs(pairs, where), run.pairs_file(number))


def _unlabelled(run: RunDirectory, recipe: Recipe, number: int) -> int:
    """How many fit and dual prompts have no row among a round's labels."""
    prompts = run.prompts()
    fits = prompts["prompt_id"][prompts["split"] != "test"]
    labels = read_parquet(run.labels_file(number, recipe.fit.grouped), ["prompt_id"])
    missing = int((~fits.isin(labels["prompt_id"])).sum())
    if missing:
        log.warning(
            "round %d: %d of %d prompts have nothing to compare and no part in the fit",
            number,
            missing,
            len(fits),
        )
    return missing


def _fit(
    run: RunDirectory, recipe: Recipe, learner: Learner, lambda_: pd.Series, number: int
) -> None:
    learner.fit(
        FitJob(
            labels=read_parquet(run.labels_file(number, recipe.fit.grouped)),
            pool=run.pool(number),
            lambda_=lambda_,
            round_number=number,
            seed=derive_seed(recipe.seed, number, "fit"),
            previous=run.adapter_folder(number - 1) if number and recipe.fit.warm_start else None,
            output=run.adapter_folder(number),
            logs=run.logs_folder(f"round-{number:03d}"),
            checkpoints=run.checkpoints_folder(number),
        )
    )


def _rescore_phase(number: int) -> str:
    return f"round-{number:03d}"


def _rescore(run: RunDirectory, recipe: Recipe, learner: Learner, number: int) -> None:
    prompts, phase = run.prompts(), _rescore_phase(number)
    job = Collection(
        phase=phase,
        folder=run.shard_folder(phase),
        source=f"round:{number}",
        responses_per_prompt=recipe.dual.responses_per_prompt,
        shard_size=recipe.sampling.shard_size,
        objectives=recipe.problem.objectives,
        seed=recipe.seed,
        round_number=number,
        adapter=run.adapter_folder(number),
    )
    samples = collect(learner, prompts[prompts["split"] != "fit"], job)
    if is_main():
        write_parquet(with_split(samples, prompts), run.samples_file(number))


def _off_policy(run: RunDirectory, learner: Learner, number: int) -> None:
    """π_θ's log-probabilities of π_ref's responses to the dual prompts, at most
    OFF_POLICY_RESPONSES of each prompt."""
    reference = read_parquet(run.reference_file)
    dual = reference[reference["split"] == "dual"]
    chosen = dual.groupby("prompt_id", sort=False).head(OFF_POLICY_RESPONSES)
    policy_logp = learner.log_probabilities(chosen, run.adapter_folder(number))
    table = chosen[["prompt_id", "response_id"]].assign(policy_logp=policy_logp)
    write_parquet(table, run.off_policy_file(number))
