"""The record of a round (round.json): a pure function of the run's tables and recipe."""

import pandas as pd

from constrained_dpo.estimates.certificate import certify, nothing
from constrained_dpo.estimates.measure import measure
from constrained_dpo.estimates.sampling_law import compare_sampler, why_not_the_policy
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.steering import initial_multipliers, next_multipliers, steered_on
from data_prep.tables import read_parquet


def certificate_record(
    run: RunDirectory,
    recipe: Recipe,
    lambda_: pd.Series,
    samples: pd.DataFrame,
    reference: pd.DataFrame,
    number: int,
) -> dict[str, object]:
    """What `certify` says of a round, from the run's tables; null where the sampling law is not the
    policy."""
    if (reason := why_not_the_policy(recipe.sampling, samples, reference)) is not None:
        return dict.fromkeys(("lagrangian", "lagrangian_se", "ess", "residual")) | nothing(reason)
    columns = [
        "prompt_id",
        "split",
        "sample_logp",
        "policy_logp",
        "ref_logp",
        *recipe.problem.objectives,
    ]
    samples, reference = (table[table["split"] == "dual"] for table in (samples, reference))
    off_policy = None
    if run.off_policy_file(number).exists():  # rounds of older releases have none
        known = read_parquet(run.off_policy_file(number))
        off_policy = reference.drop(columns="policy_logp").merge(
            known, on=["prompt_id", "response_id"]
        )
    earlier = {f"round {t}": read_parquet(run.samples_file(t), columns) for t in range(number)}
    others = {name: table[table["split"] == "dual"] for name, table in earlier.items()}
    return certify(samples, reference, others, off_policy, recipe.problem, lambda_)


def round_record(
    run: RunDirectory, recipe: Recipe, lambda_: pd.Series, earlier: list[dict]
) -> dict[str, object]:
    """round.json's estimates: a pure function of the run's tables, the recipe, λ_t and the records
    of the earlier rounds."""
    number, sampling = len(earlier), recipe.sampling
    samples, reference = read_parquet(run.samples_file(number)), read_parquet(run.reference_file)
    record = {"round": number, "lambda": lambda_.to_dict()} | measure(
        samples,
        reference,
        recipe.problem,
        confidence=recipe.dual.confidence,
        not_the_policy=why_not_the_policy(sampling, samples, reference),
    )
    if sampling.server is not None:
        record["sampler"] = compare_sampler(pd.concat([samples, reference], ignore_index=True))
    record |= certificate_record(run, recipe, lambda_, samples, reference, number)
    record["steered_on"] = steered_on(recipe, record)
    following, record["step"] = next_multipliers(recipe, record)
    law = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
    }
    return record | {"lambda_next": following.to_dict(), "sampling_law": law}


def replay(run: RunDirectory) -> list[dict[str, float]]:
    """The λ history recomputed from the run's tables and recipe alone; equals state.json's (DESIGN
    invariant 3)."""
    recipe, records = run.recipe(), []
    history = [initial_multipliers(run, recipe)]
    for _ in range(run.rounds_done()):
        records.append(round_record(run, recipe, history[-1], records))
        history.append(recipe.problem.multipliers(records[-1]["lambda_next"]))
    return [lambda_.to_dict() for lambda_ in history]
