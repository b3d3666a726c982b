"""How far the adapter of bench_quality.py reaches at all: LoRA trained on the exact Lagrangian,
its exact gradient, no samples.

    python -m benchmarks.bench_ceiling [--worlds "random 1" ...] [--scales "std 1" ...]
        [--steps 400] [--learning-rate 4e-3] [--rank 8] [--without-head] [--tail]

Every answer of the enumerable world is in every gradient, on six prompts a step, so what is
left is the adapter's and the optimizer's, not the pool's, the labels' or the loss's. λ starts
at λ* and follows the exact u of the step's prompts, so that the constraint holds about exactly
at the end and the shares closed are those of bench_quality.py, whose worlds and scales these
are. --tail: the constraint is on the lowest 5 % of the utility, at the best point of the world.
"""

import argparse
import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.bench_quality import SCALES, WORLDS, recipe_of
from benchmarks.shares import share_closed
from constrained_dpo.kinds import MEAN, Measure
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from data_prep.prompts.split import split_prompts
from data_prep.sampling.enumeration import response_tree

PROMPTS_PER_STEP = 6
DUAL_STEP = 0.05  # of λ* and per relative error of u, at the start; falls to 0


def ceiling(
    world_name: str,
    scale: str,
    steps: int,
    learning_rate: float,
    rank: int,
    head: bool,
    measure: Measure,
) -> dict[str, float]:
    """Shares closed of the objective's gap to P* and of the Lagrangian's at the last λ, that λ over
    λ*, u/b and KL, after training."""
    recipe = Recipe.model_validate(recipe_of("soft, pool grows", world_name, scale, 0, head=head))
    (constraint,), problem = recipe.problem.constraints, recipe.problem
    if measure.kind == "tail":
        tail = replace(constraint, name=f"{constraint.name}.tail", measure=measure)
        problem = replace(problem, constraints=(tail,))
    prompts, _ = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, prompts)
    policy, world = learner.policy, learner.exact.world("dual", problem).at_best_tails
    (constraint,) = world.problem.constraints
    optimum = world.exact_optimum
    tokens = torch.tensor(list(learner.exact.tokens["dual"].values()))
    (name, best), reward = next(iter(optimum.lambda_.items())), torch.tensor(world.reward)
    values = constraint.measure.values(world.utilities[constraint.column])
    utility, start = torch.tensor(values), torch.tensor(world.ref_logp)
    # of a tail, π_ref's mean at the best point is below its tail
    start_mean = float((np.exp(world.ref_logp) * values).sum(axis=1).mean())
    margin, lambda_ = float(world.levels[name]) - start_mean, best
    torch.manual_seed(0)
    targets = recipe.policy.lora.target_modules
    model = get_peft_model(
        policy.model,
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        optimizer.zero_grad()
        rows = rng.choice(len(tokens), PROMPTS_PER_STEP, replace=False)
        logp = response_tree(model, tokens[rows], *policy.eos_ids)
        score = reward[rows] + lambda_ * utility[rows]
        value = (logp.exp() * (score - problem.beta * (logp - start[rows]))).sum(dim=1).mean()
        (-value / problem.beta).backward()
        gain = ((logp.detach().exp() - start[rows].exp()) * utility[rows]).sum(dim=1).mean().item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        lambda_ = max(0.0, lambda_ - DUAL_STEP * best * (1 - step / steps) * (gain / margin - 1))
    with torch.no_grad():
        logp = torch.cat(
            [response_tree(model, few, *policy.eos_ids) for few in tokens.split(PROMPTS_PER_STEP)]
        ).numpy()
    reached = world.evaluate(logp)
    last = pd.Series({name: lambda_})
    return {
        "closed": share_closed(optimum, reached),
        "lagrangian": 1
        - world.lagrangian_gap(logp, last) / world.lagrangian_gap(world.ref_logp, last),
        "lambda": lambda_ / best,
        "u_over_b": reached.u[name] / -optimum.reference.u[name],
        "kl": reached.kl,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=["std 1"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--without-head", action="store_true")
    parser.add_argument("--tail", action="store_true")
    arguments = parser.parse_args()
    print(
        "| world | scale | gap closed | u/b | share of the Lagrangian's gap closed | λ/λ\\* | KL "
        "|\n|---|---|---|---|---|---|---|"
    )
    for world, scale in itertools.product(arguments.worlds, arguments.scales):
        values = ceiling(
            world,
            scale,
            arguments.steps,
            arguments.learning_rate,
            arguments.rank,
            not arguments.without_head,
            Measure("tail", 0.05) if arguments.tail else MEAN,
        )
        closed, lagrangian, u = (
            f"{100 * values[key]:.0f} %" for key in ("closed", "lagrangian", "u_over_b")
        )
        print(
            f"| {world} | {scale} | {closed} | {u} | {lagrangian} | {values['lambda']:.2f} | "
            f"{values['kl']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
