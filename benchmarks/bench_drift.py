"""Why fits are short and samples fresh: one more fit from a finished run's last policy, on its pool
as it is, and with fresh samples added.

    cdpo run runs/quickstart && python -m benchmarks.bench_drift runs/quickstart

Prints, per variant, the exact share of the gap from π_ref to P* that the new policy closes and the
exact Lagrangian gap (score units), and for the run's last policy how much of that gap lies on
responses that its pool has never shown.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.shares import share_closed
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.directory import RunDirectory
from data_prep.labels.preferences import label_pairs
from data_prep.quickstart import VOCABULARY
from data_prep.sampling.enumeration import enumerate_responses, exact_logps

FRESH = 512


def main(path: str) -> None:
    run = RunDirectory(Path(path))
    recipe, number = run.recipe(), run.rounds_done()
    learner, problem = LoraLearner(recipe, run.prompts(), run.score_cache), recipe.problem
    world, tokens = learner.exact.world("dual", problem), learner.exact.tokens["dual"]
    lambda_ = problem.multipliers(run.state().lambda_[-1])
    last, pool, star = (
        run.adapter_folder(number - 1),
        run.pool(recipe, number),
        world.maximizer(lambda_),
    )

    def describe(name: str, logp: np.ndarray) -> np.ndarray:
        gap = problem.beta * np.exp(logp) * (logp - star)
        closed = share_closed(world.exact_optimum, world.evaluate(logp))
        print(f"| {name} | {100 * closed:.0f} % | {gap.sum(1).mean():.3f} |", flush=True)
        return gap

    print("| policy | gap closed | Lagrangian gap |\n|---|---|---|")
    start = exact_logps(learner.policy, last, tokens)
    gap = describe("the run's last", start)
    position = {
        tuple(s): i
        for i, s in enumerate(enumerate_responses(learner.policy.eos_ids[0], len(VOCABULARY)))
    }
    row = {pid: i for i, pid in enumerate(tokens)}
    seen = np.zeros(start.shape, bool)
    for pid, ids in zip(pool["prompt_id"], pool["token_ids"], strict=True):
        seen[row[pid], position[tuple(ids)]] = True

    fresh = learner.score(
        learner.sample(
            learner.prompts[learner.prompts["split"] == "dual"],
            responses_per_prompt=FRESH,
            adapter=last,
            source="fresh",
            seed=1,
        )
    )
    variants = {
        "400 more steps at 5e-4, same pool": (pool, 5e-4),
        "400 more steps at 1e-4, same pool": (pool, 1e-4),
        f"400 more steps at 5e-4, {FRESH} fresh samples per prompt added": (
            pd.concat([pool, fresh], ignore_index=True),
            5e-4,
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, (responses, rate)) in enumerate(variants.items()):
            pairs = label_pairs(
                responses,
                problem.reward,
                lambda_,
                labels="soft",
                pairs_per_prompt=540,
                seed=recipe.seed,
                round_number=number,
            )
            settings = recipe.fit.model_copy(update={"steps": 400, "learning_rate": rate})
            output = Path(folder) / str(index)
            fit_adapter(
                learner.policy,
                pairs,
                responses,
                learner.prompt_tokens,
                FitPlan(
                    settings,
                    recipe.policy.lora,
                    beta=problem.beta,
                    seed=3,
                    previous_adapter=last,
                    output=output,
                ),
            )
            describe(name, exact_logps(learner.policy, output, tokens))
    off = (gap * ~seen).sum(1).mean() / gap.sum(1).mean()
    print(
        f"\nof the last policy's Lagrangian gap, {100 * off:.0f} % lies on responses its pool has "
        "never shown"
    )


if __name__ == "__main__":
    main(sys.argv[1])
