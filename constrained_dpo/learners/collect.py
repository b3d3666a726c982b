"""Samples and scores a policy for the dual step and the test, shard by shard; and what is estimated
from them."""

import pandas as pd
from tqdm import tqdm

from constrained_dpo.launch import num_processes, rank, wait
from constrained_dpo.run.directory import RunDirectory
from data_prep.settings import derive_seed
from data_prep.tables import read_parquet, validate_responses, write_parquet


def collect(
    run: RunDirectory,
    learner,
    prompts: pd.DataFrame,
    *,
    phase: str,
    round_number: int,
    responses_per_prompt: int,
    adapter,
    source: str,
    shard_size: int,
    objectives: list[str],
    seed: int,
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Scored responses to `prompts` (num_prompts × K rows), each shard committed as a file before
    the next is drawn.

    A shard's prompts and seed are pure functions of the arguments, so a killed run that resumes
    draws the same responses. With `known` (responses of the same policy and law to these prompts)
    nothing is drawn; they are only scored. The processes of a launch divide the shards by number,
    wait for each other, and all return the whole table.
    """
    per_shard = max(1, shard_size // responses_per_prompt)
    folder = run.shard_folder(phase)
    paths = [folder / f"{number:05d}.parquet" for number in range(-(-len(prompts) // per_shard))]
    own = range(rank(), len(paths), num_processes())
    for number in tqdm(
        own, desc=f"{phase}: sample and score", unit="shard", disable=None, leave=False
    ):
        if not paths[number].exists():
            chosen = prompts.iloc[number * per_shard : (number + 1) * per_shard]
            if known is not None:
                drawn = known[known["prompt_id"].isin(chosen["prompt_id"])].reset_index(drop=True)
            else:
                drawn = learner.sample(
                    chosen,
                    responses_per_prompt=responses_per_prompt,
                    adapter=adapter,
                    source=source,
                    seed=derive_seed(seed, round_number, phase, number),
                )
            write_parquet(
                validate_responses(learner.score(drawn), objectives, phase), paths[number]
            )
    wait()
    return pd.concat([read_parquet(path) for path in paths], ignore_index=True)
