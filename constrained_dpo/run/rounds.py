"""One dual iteration: relabel → fit → re-score → dual step. Every phase is a file; a phase whose
file exists is done.

The learner is an argument: anything with fit, sample and score. `LoraLearner` trains a language
model; `TabularLearner` is the exact maximizer over an enumerated world. A fit may come in stretches
(`fit.refresh`), with fresh samples and labels between. A conditional fit is followed by trials of
its members (`run.trials`); the round's adapter is the member at the multipliers that they find.

Under `accelerate launch` every process plays the round: sampling, scoring and the fit are shared,
and what the main process alone writes is on disk before any goes on (`launch.wait`).
"""

import logging
from dataclasses import replace
from functools import partial

import pandas as pd

from constrained_dpo.dual.solution import Solution
from constrained_dpo.launch import is_main, num_processes, summed, wait
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.protocol import Learner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import MORE_FITS, RunDirectory
from constrained_dpo.run.family import target_of, trial_responses
from constrained_dpo.run.fits import fit_policy
from constrained_dpo.run.phases import Round, phases
from constrained_dpo.run.prepare import drop_shards, with_split
from constrained_dpo.run.record import RoundRecord, RoundTables, round_record
from constrained_dpo.run.relabel import unlabelled
from constrained_dpo.run.trials import Search, search
from constrained_dpo.tracking import log_round
from data_prep.files import write_json
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.sampling.law import is_policy_law

log = logging.getLogger(__name__)

OFF_POLICY_RESPONSES = 64
"""Responses of π_ref per dual prompt that a round's policy is asked about: enough for the residual,
and a bound on its cost."""


def play_round(run: RunDirectory, recipe: Recipe, learner: Learner) -> RoundRecord:
    """Play one dual iteration; return its record (round.json). Resume what a kill left undone."""
    state = run.state()
    number = state.rounds_done
    recipe = recipe.at_tail_points(state.tail_points_of(-1))
    lambda_ = recipe.problem.multipliers(state.lambda_[-1])
    seconds: dict[str, float | None] = dict.fromkeys(phases(recipe))
    this = Round(run, recipe, learner, number, lambda_, seconds)
    adapter, samples = run.adapter_folder(number), run.samples_file(number)
    if recipe.fit.conditional is None:
        fit_policy(this, adapter, attempt=0)
    elif not adapter.exists():
        solve(this)
    missing = unlabelled(run, recipe, number) if is_main() else 0
    this.phase("rescore", samples.exists(), lambda: _rescore(this), shared=True)
    if is_policy_law(recipe.sampling):
        done = run.off_policy_file(number).exists()
        this.phase("off_policy", done, lambda: _off_policy(run, learner, number))
    counts = {"truncated_scores": summed(learner.truncated()), "unlabelled_prompts": missing}
    cost = {"sampling_cost": learner.sampling_cost()}
    if is_main():
        _close_round(this, {"seconds": this.seconds, **counts, **cost})
    wait()
    return RoundRecord.read(run.round_file(number))


def solve(this: Round) -> None:
    """Fit the family, try its members, and write the adapter of the one that meets the levels; a
    family that does not answer λ yet is fitted further first."""
    run, number = this.run, this.number
    for attempt in range(MORE_FITS + 1):
        fit_policy(this, run.family_folder(number, attempt), attempt)
        solutions: list[Solution] = []
        done = run.adapter_folder(number).exists()
        this.phase("trials", done, partial(_trials, this, attempt, solutions), shared=True)
        mute = [name for name, responds in solutions[0].responds.items() if not responds]
        if not mute or attempt == MORE_FITS:
            break
        log.warning(
            "round %d: u of %s does not answer λ yet; the family is fitted further",
            number,
            " and ".join(mute),
        )
    if is_main():
        family, member = run.family_folder(number, attempt), solutions[0]
        this.learner.write_member(family, member.lambda_, member.kappa, run.adapter_folder(number))
    wait()


def _trials(this: Round, attempt: int, solutions: list[Solution]) -> None:
    """Try members of a family; the solution joins the list."""
    run, recipe, number = this.run, this.recipe, this.number
    reference = read_parquet(run.reference_file)
    search_ = Search(
        family=run.family_folder(number, attempt),
        folder=run.trials_folder(number, attempt),
        shards=run.path / "shards",
        phase=f"round-{number:03d}-trial-{attempt}",
        source=f"trial:{number}.{attempt}",
        round_number=number,
        responses_per_prompt=trial_responses(recipe),
    )
    target = target_of(run, recipe, this.lambda_, number)
    if target is None:
        raise ValueError("fit.conditional is null: there is no family to try")
    on_dual = reference[reference["split"] == "dual"]
    solutions.append(search(search_, target, recipe, this.learner, this.dual, on_dual))


def _close_round(this: Round, facts: dict[str, object]) -> None:
    """The dual step and what a round leaves: the pool's growth, round.json, the trackers' point,
    λ_{t+1} in state.json. facts: fields of the record that no table holds."""
    run, recipe, number = this.run, this.recipe, this.number
    state = run.state()
    if recipe.pool.grow and not run.pool_file(number).exists():
        write_parquet(_grown(this), run.pool_file(number))
    if not run.round_file(number).exists():
        target = target_of(run, recipe, this.lambda_, number)
        record = round_record(RoundTables.read(run, number), recipe, this.lambda_, target)
        facts |= {"hashes": state.hashes, "processes": num_processes()}
        if this.learner.exact is not None:
            at = recipe.problem.multipliers(record.policy_lambda)
            problem = replace(recipe.problem, beta=recipe.problem.beta / record.kappa)
            adapter = run.adapter_folder(number)
            facts["exact"] = this.learner.exact.policy(adapter, at, problem)
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
    for stretch in range((MORE_FITS + 1) * recipe.stretches):
        run.refresh_file(number, stretch).unlink(missing_ok=True)
    points = [*state.tail_points, record.tail_points_next]
    update = {"lambda_": [*state.lambda_, record.lambda_next], "tail_points": points}
    run.write_state(state.model_copy(update=update))


def _grown(this: Round) -> pd.DataFrame:
    """What a round adds to the pool: its samples on the dual prompts, those of its trials (with the
    λ and κ of their members), and those between the stretches of its fits."""
    run, recipe, number = this.run, this.recipe, this.number
    samples = read_parquet(run.samples_file(number))
    parts = [samples[samples["split"] == "dual"].drop(columns="split")]
    for attempt in range(MORE_FITS + 1):
        files = sorted(run.trials_folder(number, attempt).glob("[0-9]*.parquet"))
        parts += [read_parquet(file) for file in files]
    stretches = range((MORE_FITS + 1) * recipe.stretches)
    files = [f for k in stretches if (f := run.refresh_file(number, k)).exists()]
    return pd.concat([*parts, *map(read_parquet, files)], ignore_index=True)


def _rescore_phase(number: int) -> str:
    return f"round-{number:03d}"


def _rescore(this: Round) -> None:
    run, recipe, number = this.run, this.recipe, this.number
    prompts, phase = run.prompts(), _rescore_phase(number)
    responses, adapter = recipe.dual.responses_per_prompt, run.adapter_folder(number)
    job = this.collection(phase, f"round:{number}", responses, adapter)
    samples = collect(this.learner, prompts[prompts["split"] != "fit"], job)
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
