"""The loop: prepare, then rounds of relabel → fit → re-score → dual step. Every phase is a file; a
phase whose file exists is done.

The learner is an argument: anything with fit, sample and score. `LoraLearner` trains a language
model; `TabularLearner` is the exact maximizer over an enumerated world.

Under `accelerate launch` every process plays the loop: sampling, scoring and the fit are shared,
and what the main process alone writes is on disk before any goes on (`devices.wait`).
"""

import sys
from collections.abc import Callable

import pandas as pd

from constrained_dpo.launch import is_main, num_processes, summed, wait
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.progress import Announce, silent, timed
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import _drop_shards, _with_split
from constrained_dpo.run.record import round_record
from constrained_dpo.tracking import log_round
from data_prep.files import write_json
from data_prep.labels.lagrangian import lagrangian_score
from data_prep.labels.pool import choose_responses
from data_prep.labels.preferences import label_groups, label_pairs
from data_prep.prompts.preference_rows import labelled
from data_prep.sampling.law import is_policy_law
from data_prep.settings import derive_seed
from data_prep.tables import read_parquet, validate_groups, validate_pairs, write_parquet

OFF_POLICY_RESPONSES = 64
"""Responses of π_ref per dual prompt that a round's policy is asked about: enough for the residual,
and a bound on its cost."""


def play_round(
    run: RunDirectory, recipe: Recipe, learner: Learner, announce: Announce = silent
) -> dict[str, object]:
    """One dual iteration: relabel, fit, re-score, dual step. Returns the round's record
    (round.json); resumes what a kill left undone."""
    state = run.state()
    number = len(state["lambda"]) - 1
    lambda_ = recipe.problem.multipliers(state["lambda"][-1])
    seconds: dict[str, float | None] = dict.fromkeys(("relabel", "fit", "rescore", "off_policy"))

    def phase(name: str, done: bool, action: Callable[[], None], shared: bool = False) -> None:
        """Does what is not done yet: in every process where the work is shared, else in the main
        one. All leave it together."""
        if not done and (shared or is_main()):
            seconds[name] = timed(announce, f"round {number}: {name}", action)
        wait()

    phase(
        "relabel",
        run.labels_file(number, recipe.fit.grouped).exists(),
        lambda: _relabel(run, recipe, lambda_, number),
    )
    unlabelled = _unlabelled(run, recipe, number) if is_main() else 0
    phase(
        "fit",
        run.adapter_folder(number).exists(),
        lambda: _fit(run, recipe, learner, lambda_, number),
        shared=True,
    )
    phase(
        "rescore",
        run.samples_file(number).exists(),
        lambda: _rescore(run, recipe, learner, number),
        shared=True,
    )
    if is_policy_law(recipe.sampling):
        phase(
            "off_policy",
            run.off_policy_file(number).exists(),
            lambda: _off_policy(run, learner, number),
        )
    truncated = summed(getattr(learner, "truncated", dict)())
    if is_main():
        _close_round(run, recipe, learner, state, seconds, truncated, unlabelled)
    wait()
    return run.round_record(number)


def _close_round(
    run: RunDirectory,
    recipe: Recipe,
    learner: Learner,
    state: dict,
    seconds: dict[str, float | None],
    truncated: dict[str, int],
    unlabelled: int,
) -> None:
    """The dual step and what a round leaves: the pool's growth, round.json, the trackers' point,
    λ_{t+1} in state.json."""
    number = len(state["lambda"]) - 1
    lambda_ = recipe.problem.multipliers(state["lambda"][-1])
    if recipe.pool.grow and not run.pool_file(number).exists():
        samples = read_parquet(run.samples_file(number))
        write_parquet(
            samples[samples["split"] == "dual"].drop(columns="split"), run.pool_file(number)
        )
    if not run.round_file(number).exists():
        record = round_record(run, recipe, lambda_, [run.round_record(t) for t in range(number)])
        record |= {
            "exact": learner.exact(run.adapter_folder(number), lambda_),
            "seconds": seconds,
            "hashes": state["hashes"],
        }
        if truncated:
            record["truncated_scores"] = truncated
        if unlabelled:
            record["unlabelled_prompts"] = unlabelled
        if num_processes() > 1:
            record["processes"] = num_processes()
        write_json(run.round_file(number), record)
    record = run.round_record(number)
    log_round(run, recipe, record)
    state["lambda"].append(record["lambda_next"])
    _drop_shards(run, _rescore_phase(number))
    run.write_state(state)


def _relabel(run: RunDirectory, recipe: Recipe, lambda_: pd.Series, number: int) -> None:
    fit, shares = recipe.fit, recipe.pool.shares
    if fit.labels == "given":
        pool = run.pool(0)
        score = pd.Series(
            lagrangian_score(pool, recipe.problem.reward, lambda_), index=pool["response_id"]
        )
        pairs = labelled(read_parquet(run.given_pairs_file), score)
        write_parquet(validate_pairs(pairs, f"pairs of round {number}"), run.pairs_file(number))
        return
    pool = choose_responses(
        run.pool(number),
        None if shares is None else shares.model_dump(),
        recipe.pool.max_per_prompt,
        reward=recipe.problem.reward,
        lambda_=lambda_,
        beta=recipe.problem.beta,
        seed=recipe.seed,
        round_number=number,
    )
    if fit.grouped:
        groups = label_groups(
            pool,
            recipe.problem.reward,
            lambda_,
            group_size=fit.group_size,
            groups_per_prompt=fit.groups_per_prompt,
            seed=recipe.seed,
            round_number=number,
        )
        write_parquet(validate_groups(groups, f"groups of round {number}"), run.groups_file(number))
        return
    pairs = label_pairs(
        pool,
        recipe.problem.reward,
        lambda_,
        labels=fit.labels,
        seed=recipe.seed,
        round_number=number,
        pairs_per_prompt=None if fit.pairs_per_prompt == "all" else fit.pairs_per_prompt,
    )
    write_parquet(validate_pairs(pairs, f"pairs of round {number}"), run.pairs_file(number))


def _unlabelled(run: RunDirectory, recipe: Recipe, number: int) -> int:
    """How many fit and dual prompts have no row among a round's labels; says so on stderr where
    there are any."""
    prompts = run.prompts()
    fits = prompts["prompt_id"][prompts["split"] != "test"]
    missing = int(
        (
            ~fits.isin(
                read_parquet(run.labels_file(number, recipe.fit.grouped), ["prompt_id"])[
                    "prompt_id"
                ]
            )
        ).sum()
    )
    if missing:
        print(
            f"round {number}: {missing} of {len(fits)} prompts have nothing to compare and no "
            "part in the fit",
            file=sys.stderr,
        )
    return missing


def _fit(
    run: RunDirectory, recipe: Recipe, learner: Learner, lambda_: pd.Series, number: int
) -> None:
    previous = run.adapter_folder(number - 1) if number and recipe.fit.warm_start else None
    learner.fit(
        read_parquet(run.labels_file(number, recipe.fit.grouped)),
        run.pool(number),
        lambda_=lambda_,
        previous=previous,
        output=run.adapter_folder(number),
        seed=derive_seed(recipe.seed, number, "fit"),
    )


def _rescore_phase(number: int) -> str:
    return f"round-{number:03d}"


def _rescore(run: RunDirectory, recipe: Recipe, learner: Learner, number: int) -> None:
    prompts = run.prompts()
    phase = _rescore_phase(number)
    samples = collect(
        run,
        learner,
        prompts[prompts["split"] != "fit"],
        phase=phase,
        round_number=number,
        responses_per_prompt=recipe.dual.responses_per_prompt,
        adapter=run.adapter_folder(number),
        source=f"round:{number}",
        shard_size=recipe.sampling.shard_size,
        objectives=recipe.problem.objectives,
        seed=recipe.seed,
    )
    if is_main():
        write_parquet(_with_split(samples, prompts), run.samples_file(number))


def _off_policy(run: RunDirectory, learner: Learner, number: int) -> None:
    """π_θ's log-probabilities of π_ref's responses to the dual prompts, at most
    OFF_POLICY_RESPONSES of each prompt."""
    reference = read_parquet(run.reference_file)
    chosen = (
        reference[reference["split"] == "dual"]
        .groupby("prompt_id", sort=False)
        .head(OFF_POLICY_RESPONSES)
    )
    policy_logp = learner.log_probabilities(chosen, run.adapter_folder(number))
    write_parquet(
        chosen[["prompt_id", "response_id"]].assign(policy_logp=policy_logp),
        run.off_policy_file(number),
    )
