"""Samples and scores of a policy, shard by shard: what a kill leaves is used by the same call."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.estimates.draws import DrawRule, require_policy_draws
from constrained_dpo.launch import num_processes, rank, wait
from constrained_dpo.learners.protocol import Source
from constrained_dpo.progress import Bar
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.settings import derive_seed
from data_prep.tables import TOKEN_IDS, validate_responses

REFERENCE = "sample and score, π_ref"

FIRST_OF_POLICY = 1.3
"""Seconds of a policy's response over those of π_ref, as its first bar takes them to be; 0.9 to 1.8
were seen."""


@dataclass(frozen=True)
class Collection:
    """What is collected, and how.

    phase: names seeds and messages; folder: where shards are committed; source: of the responses'
    ids; shard_size: responses that are drawn and committed together; objectives: columns that the
    scores must have; rule: what a server's draws must hold to, None where none draws. given:
    responses of the same policy and law to these prompts, which are then only scored.
    """

    phase: str
    folder: Path
    source: str
    responses_per_prompt: int
    shard_size: int
    objectives: list[str]
    seed: int
    rule: DrawRule | None
    round_number: int = 0
    adapter: Path | None = None
    given: pd.DataFrame | None = None


def collect(learner: Source, prompts: pd.DataFrame, job: Collection) -> pd.DataFrame:
    """Collect scored responses to prompts: (num_prompts × K) rows of the responses table, in the
    prompts' order.

    Each shard is a file before the next is drawn. A shard's prompts and seed are pure functions of
    the arguments, so a killed run that resumes draws the same responses. Raises UserError for
    draws of a server that are not the policy's, of a shard or of all together, and for shards of
    other prompts. The processes of a launch divide the shards by number, wait for each other, and
    all return the whole table.
    """
    planned = _longest_first(prompts)
    per_shard = max(1, job.shard_size // job.responses_per_prompt)
    count = -(-len(prompts) // per_shard)
    paths = [job.folder / f"{number:05d}.parquet" for number in range(count)]
    shards = {n: planned.iloc[n * per_shard : (n + 1) * per_shard] for n in range(count)}
    sizes = {n: len(chosen) * job.responses_per_prompt for n, chosen in shards.items()}
    numbers = range(rank(), count, num_processes())
    todo = [number for number in numbers if not paths[number].exists()]
    total, left = (sum(sizes[number] for number in group) for group in (numbers, todo))
    kind = f"sample and score, policy, {job.responses_per_prompt} responses of a prompt"
    kind = REFERENCE if job.adapter is None else kind
    with Bar(
        f"{job.phase}: sample and score",
        total=total,
        unit="response",
        kind=kind,
        like=(REFERENCE, FIRST_OF_POLICY),
        done=total - left,
    ) as bar:
        for number in todo:
            drawn = _drawn(learner, shards[number], job, number)
            # before its scores are computed, and before it is kept
            require_policy_draws(drawn, job.rule, job.phase)
            scored = learner.score(drawn)
            write_parquet(validate_responses(scored, job.objectives, job.phase), paths[number])
            bar.step(sizes[number])
    wait()
    table = pd.concat([read_parquet(path) for path in paths], ignore_index=True)
    place = pd.Series(range(len(prompts)), index=prompts["prompt_id"])
    if set(table["prompt_id"]) != set(place.index):
        raise UserError(
            f"{job.folder}: holds shards of other prompts, or of an older version; delete it to "
            "draw them again"
        )
    table = table.sort_values(
        "prompt_id", key=lambda ids: ids.map(place), kind="stable", ignore_index=True
    )
    again = f"{job.phase} (all shards; delete {job.folder} to draw them again)"
    require_policy_draws(table, job.rule, again)
    return table


def _longest_first(prompts: pd.DataFrame) -> pd.DataFrame:
    """Prompts of like length share a shard, so that little of it is padding; where memory does not
    suffice, the first shard says so. Characters count where no tokens are kept, as of a gate's own
    prompts."""
    by = TOKEN_IDS if TOKEN_IDS in prompts else "prompt"
    return prompts.sort_values(by, key=lambda texts: -texts.map(len), kind="stable")


def _drawn(learner: Source, prompts: pd.DataFrame, job: Collection, number: int) -> pd.DataFrame:
    if job.given is not None:
        rows = job.given["prompt_id"].isin(prompts["prompt_id"])
        return job.given[rows].reset_index(drop=True)
    return learner.sample(
        prompts,
        responses_per_prompt=job.responses_per_prompt,
        adapter=job.adapter,
        source=job.source,
        seed=derive_seed(job.seed, job.round_number, job.phase, number),
    )
