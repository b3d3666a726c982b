"""The loop: prepare, then rounds of relabel → fit → re-score → dual step. Every phase is a file; a phase whose file exists is done.

The learner is an argument: anything with fit, sample and score. `LoraLearner` trains a language model; `TabularLearner` is the exact
maximizer over an enumerated world.

Under `accelerate launch` every process plays the loop: sampling, scoring and the fit are shared, and what the main process alone writes is
on disk before any goes on (`devices.wait`).
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from constrained_dpo.certificate import certify, nothing
from constrained_dpo.dataset_pool import prepare_dataset_pool
from constrained_dpo.devices import is_main, num_processes, summed, wait
from constrained_dpo.recipe import Recipe
from constrained_dpo.rescore import collect, measure
from constrained_dpo.run_directory import RunDirectory
from constrained_dpo.sampler_check import compare_sampler, why_not_the_policy
from constrained_dpo.scorer_facts import scorer_facts
from constrained_dpo.steering import initial_multipliers, next_multipliers, resolve_margins, resolve_step_scale, steered_on
from constrained_dpo.tracking import log_round
from data_prep.answers import labelled
from data_prep.pool import choose_responses
from data_prep.preferences import label_groups, label_pairs, lagrangian_score
from data_prep.sampling import is_policy_law
from data_prep.settings import UserError, derive_seed
from data_prep.tables import hash_file, read_parquet, validate_groups, validate_pairs, write_json, write_parquet

OFF_POLICY_RESPONSES = 64
"""Responses of π_ref per dual prompt that a round's policy is asked about: enough for the residual, and a bound on its cost."""

Announce = Callable[[str, float | None], None]
"""Told a phase's name with None when it begins, and with its seconds when it is done."""


def silent(phase: str, seconds: float | None) -> None:
    """The `Announce` that says nothing."""


def timed(announce: Announce, phase: str, action: Callable[[], None]) -> float:
    """Runs a phase and announces it; returns its seconds."""
    announce(phase, None)
    start = time.perf_counter()
    action()
    seconds = round(time.perf_counter() - start, 2)
    announce(phase, seconds)
    return seconds


class Learner(Protocol):
    """What a round needs. Tables are those of `data_prep.tables`; an adapter is a folder that the learner wrote."""

    prompts: pd.DataFrame

    def fit(
        self, labels: pd.DataFrame, pool: pd.DataFrame, *, lambda_: pd.Series, previous: Path | None, output: Path, seed: int
    ) -> None: ...

    def sample(self, prompts: pd.DataFrame, *, responses_per_prompt: int, adapter: Path | None, source: str, seed: int) -> pd.DataFrame: ...

    def score(self, responses: pd.DataFrame) -> pd.DataFrame: ...

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path) -> np.ndarray: ...

    def identity(self) -> dict[str, object]: ...

    def exact(self, adapter: Path, lambda_: pd.Series) -> dict[str, dict] | None: ...

    def optimum(self) -> dict[str, dict] | None: ...

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict]: ...


def prepare(run: RunDirectory, recipe: Recipe, learner: Learner, left_out: dict[str, int], announce: Announce = silent) -> Recipe:
    """Everything before round 0: prompts, π_ref's scored responses, ḡ_ref, the step's scale, λ_0. Returns the resolved recipe.

    left_out: counts of prompts left out, for state.json. Raises UserError for a score that is constant on the reference pool.
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
            raise UserError(f"{run.path}: {key} is not that of {inherited['from']}, whose responses it takes over; init it without --from")

    def reference_samples(phase: str, chosen: pd.DataFrame, count: int) -> pd.DataFrame:
        return collect(
            run, learner, chosen, phase=phase, round_number=0, responses_per_prompt=count, adapter=None, source=f"reference-{phase}",
            shard_size=sampling.shard_size, objectives=problem.objectives, seed=recipe.seed,
            known=read_parquet(run.inherited_file(phase)) if inherited else None,
        )  # fmt: skip

    def sample_pool() -> None:
        pool = reference_samples("pool", prompts[prompts["split"] != "test"], sampling.responses_per_prompt)
        _require_varying(pool, problem.objectives)
        if is_main():
            write_parquet(pool, run.pool_file(None))

    def sample_reference() -> None:
        reference = reference_samples("reference", prompts[prompts["split"] != "fit"], dual.responses_per_prompt)
        if recipe.pool.source == "dataset":
            _require_varying(reference, problem.objectives)
        if is_main():
            write_parquet(_with_split(reference, prompts), run.reference_file)

    if recipe.pool.source != "dataset" and not run.pool_file(None).exists():
        timed(announce, "prepare: sample and score π_ref on fit prompts", sample_pool)
    if not run.reference_file.exists():
        timed(announce, "prepare: sample and score π_ref on dual and test prompts", sample_reference)
    if recipe.pool.source != "reference" and not run.dataset_pool_file.exists():
        timed(announce, "prepare: read and score the dataset's responses", lambda: prepare_dataset_pool(run, learner))
    wait()
    if is_main():
        recipe = _begin(run, recipe, learner, identity, left_out)
    wait()
    return recipe if is_main() else run.recipe()


def _keep_prompts(run: RunDirectory, prompts: pd.DataFrame) -> None:
    if not run.prompts_file.exists():
        write_parquet(prompts, run.prompts_file)
    elif not read_parquet(run.prompts_file).equals(prompts.reset_index(drop=True)):
        raise UserError(f"{run.prompts_file}: the prompt source changed while the run was being prepared; restore it or start another run")


def _begin(run: RunDirectory, recipe: Recipe, learner: Learner, identity: dict[str, object], left_out: dict[str, int]) -> Recipe:
    """The end of `prepare`, from π_ref's scored responses: margins, what is known of the scorers, exact optimum, step scale, λ_0, state.
    Returns the resolved recipe."""
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
    """π_ref's scored responses in the pool; where a dataset's make the pool, those on the dual prompts."""
    if recipe.pool.source != "dataset":
        return read_parquet(run.pool_file(None))
    reference = read_parquet(run.reference_file)
    return reference[reference["split"] == "dual"]


def _drop_shards(run: RunDirectory, *phases: str) -> None:
    """Drops the shards that whole tables were made of; before the state is written, so that a kill in between only repeats it."""
    for phase in phases:
        shutil.rmtree(run.shard_folder(phase), ignore_errors=True)


def _with_split(responses: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    return responses.assign(split=responses["prompt_id"].map(prompts.set_index("prompt_id")["split"]))


def _require_varying(pool: pd.DataFrame, objectives: list[str]) -> None:
    for name in objectives:
        if pool[name].nunique() < 2:
            value = pool[name].iloc[0]
            raise UserError(f"scorer of {name}: gives {value} to all {len(pool)} reference responses; it cannot tell responses apart")


def play_round(run: RunDirectory, recipe: Recipe, learner: Learner, announce: Announce = silent) -> dict[str, object]:
    """One dual iteration: relabel, fit, re-score, dual step. Returns the round's record (round.json); resumes what a kill left undone."""
    state = run.state()
    number = len(state["lambda"]) - 1
    lambda_ = recipe.problem.multipliers(state["lambda"][-1])
    seconds: dict[str, float | None] = dict.fromkeys(("relabel", "fit", "rescore", "off_policy"))

    def phase(name: str, done: bool, action: Callable[[], None], shared: bool = False) -> None:
        """Does what is not done yet: in every process where the work is shared, else in the main one. All leave it together."""
        if not done and (shared or is_main()):
            seconds[name] = timed(announce, f"round {number}: {name}", action)
        wait()

    phase("relabel", run.labels_file(number, recipe.fit.grouped).exists(), lambda: _relabel(run, recipe, lambda_, number))
    unlabelled = _unlabelled(run, recipe, number) if is_main() else 0
    phase("fit", run.adapter_folder(number).exists(), lambda: _fit(run, recipe, learner, lambda_, number), shared=True)
    phase("rescore", run.samples_file(number).exists(), lambda: _rescore(run, recipe, learner, number), shared=True)
    if is_policy_law(recipe.sampling):
        phase("off_policy", run.off_policy_file(number).exists(), lambda: _off_policy(run, learner, number))
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
    """The dual step and what a round leaves: the pool's growth, round.json, the trackers' point, λ_{t+1} in state.json."""
    number = len(state["lambda"]) - 1
    lambda_ = recipe.problem.multipliers(state["lambda"][-1])
    if recipe.pool.grow and not run.pool_file(number).exists():
        samples = read_parquet(run.samples_file(number))
        write_parquet(samples[samples["split"] == "dual"].drop(columns="split"), run.pool_file(number))
    if not run.round_file(number).exists():
        record = round_record(run, recipe, lambda_, [run.round_record(t) for t in range(number)])
        record |= {"exact": learner.exact(run.adapter_folder(number), lambda_), "seconds": seconds, "hashes": state["hashes"]}
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
        score = pd.Series(lagrangian_score(pool, recipe.problem.reward, lambda_), index=pool["response_id"])
        pairs = labelled(read_parquet(run.given_pairs_file), score)
        write_parquet(validate_pairs(pairs, f"pairs of round {number}"), run.pairs_file(number))
        return
    pool = choose_responses(
        run.pool(number), None if shares is None else shares.model_dump(), recipe.pool.max_per_prompt, reward=recipe.problem.reward,
        lambda_=lambda_, beta=recipe.problem.beta, seed=recipe.seed, round_number=number,
    )  # fmt: skip
    if fit.grouped:
        groups = label_groups(
            pool, recipe.problem.reward, lambda_, group_size=fit.group_size, groups_per_prompt=fit.groups_per_prompt, seed=recipe.seed,
            round_number=number,
        )  # fmt: skip
        write_parquet(validate_groups(groups, f"groups of round {number}"), run.groups_file(number))
        return
    pairs = label_pairs(
        pool, recipe.problem.reward, lambda_, labels=fit.labels, seed=recipe.seed, round_number=number,
        pairs_per_prompt=None if fit.pairs_per_prompt == "all" else fit.pairs_per_prompt,
    )  # fmt: skip
    write_parquet(validate_pairs(pairs, f"pairs of round {number}"), run.pairs_file(number))


def _unlabelled(run: RunDirectory, recipe: Recipe, number: int) -> int:
    """How many fit and dual prompts have no row among a round's labels; says so on stderr where there are any."""
    prompts = run.prompts()
    fits = prompts["prompt_id"][prompts["split"] != "test"]
    missing = int((~fits.isin(read_parquet(run.labels_file(number, recipe.fit.grouped), ["prompt_id"])["prompt_id"])).sum())
    if missing:
        print(f"round {number}: {missing} of {len(fits)} prompts have nothing to compare and no part in the fit", file=sys.stderr)
    return missing


def _fit(run: RunDirectory, recipe: Recipe, learner: Learner, lambda_: pd.Series, number: int) -> None:
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
        run, learner, prompts[prompts["split"] != "fit"], phase=phase, round_number=number,
        responses_per_prompt=recipe.dual.responses_per_prompt, adapter=run.adapter_folder(number), source=f"round:{number}",
        shard_size=recipe.sampling.shard_size, objectives=recipe.problem.objectives, seed=recipe.seed,
    )  # fmt: skip
    if is_main():
        write_parquet(_with_split(samples, prompts), run.samples_file(number))


def _off_policy(run: RunDirectory, learner: Learner, number: int) -> None:
    """π_θ's log-probabilities of π_ref's responses to the dual prompts, at most OFF_POLICY_RESPONSES of each prompt."""
    reference = read_parquet(run.reference_file)
    chosen = reference[reference["split"] == "dual"].groupby("prompt_id", sort=False).head(OFF_POLICY_RESPONSES)
    policy_logp = learner.log_probabilities(chosen, run.adapter_folder(number))
    write_parquet(chosen[["prompt_id", "response_id"]].assign(policy_logp=policy_logp), run.off_policy_file(number))


def certificate_record(
    run: RunDirectory, recipe: Recipe, lambda_: pd.Series, samples: pd.DataFrame, reference: pd.DataFrame, number: int
) -> dict[str, object]:
    """What `certify` says of a round, from the run's tables; null where the sampling law is not the policy."""
    if (reason := why_not_the_policy(recipe.sampling, samples, reference)) is not None:
        return dict.fromkeys(("lagrangian", "lagrangian_se", "ess", "residual")) | nothing(reason)
    columns = ["prompt_id", "split", "sample_logp", "policy_logp", "ref_logp", *recipe.problem.objectives]
    samples, reference = (table[table["split"] == "dual"] for table in (samples, reference))
    off_policy = None
    if run.off_policy_file(number).exists():  # rounds of older releases have none
        known = read_parquet(run.off_policy_file(number))
        off_policy = reference.drop(columns="policy_logp").merge(known, on=["prompt_id", "response_id"])
    earlier = {f"round {t}": read_parquet(run.samples_file(t), columns) for t in range(number)}
    others = {name: table[table["split"] == "dual"] for name, table in earlier.items()}
    return certify(samples, reference, others, off_policy, recipe.problem, lambda_)


def round_record(run: RunDirectory, recipe: Recipe, lambda_: pd.Series, earlier: list[dict]) -> dict[str, object]:
    """round.json's estimates: a pure function of the run's tables, the recipe, λ_t and the records of the earlier rounds."""
    number, sampling = len(earlier), recipe.sampling
    samples, reference = read_parquet(run.samples_file(number)), read_parquet(run.reference_file)
    record = {"round": number, "lambda": lambda_.to_dict()} | measure(
        samples, reference, recipe.problem, confidence=recipe.dual.confidence,
        not_the_policy=why_not_the_policy(sampling, samples, reference),
    )  # fmt: skip
    if sampling.server is not None:
        record["sampler"] = compare_sampler(pd.concat([samples, reference], ignore_index=True))
    record |= certificate_record(run, recipe, lambda_, samples, reference, number)
    record["steered_on"] = steered_on(recipe, record)
    following, record["step"] = next_multipliers(recipe, record)
    law = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_new_tokens": sampling.max_new_tokens}
    return record | {"lambda_next": following.to_dict(), "sampling_law": law}


def replay(run: RunDirectory) -> list[dict[str, float]]:
    """The λ history recomputed from the run's tables and recipe alone; equals state.json's (DESIGN invariant 3)."""
    recipe, records = run.recipe(), []
    history = [initial_multipliers(run, recipe)]
    for _ in range(run.rounds_done()):
        records.append(round_record(run, recipe, history[-1], records))
        history.append(recipe.problem.multipliers(records[-1]["lambda_next"]))
    return [lambda_.to_dict() for lambda_ in history]


def require_same_inputs(run: RunDirectory, learner: Learner) -> None:
    """Raises UserError when policy, scorers, sampling law or prompts are not those the run was prepared with."""
    hashes = run.state()["hashes"]
    current = {**learner.identity(), "prompts": hash_file(run.prompts_file)[:16]}
    for key, value in hashes.items():
        now = current.get(key)
        if now != value:
            if key == "scorers" and (odd := [name for name in value if now.get(name) != value[name]]):
                raise UserError(
                    f"{run.path}: the scorer of {', '.join(odd)} changed since `prepare` (its file or its model); restore it, or start "
                    "another run"
                )
            raise UserError(
                f"{run.path}: {key} changed since `prepare` ({value} then, {current.get(key)} now); restore it or start another run"
            )


def share_of_gap_closed(exact: dict, optimum: dict) -> float:
    """(objective − objective of π_ref) / (P* − objective of π_ref), exact values of one split."""
    start = optimum["reference"]["objective"]
    gap = optimum["objective"] - start
    return float((exact["objective"] - start) / gap) if gap > 0 else float(np.nan)
