"""`bench_family peers`: other ways to a front, at the passes of one conditional run of four rounds.

*rewarded soups* (arXiv:2306.04488): two plain fits, at λ = 0 and at the exact λ* of the highest
margin, their weights interpolated; *MOD* (arXiv:2406.18853): the same two policies, their
next-token log-probabilities interpolated and renormalized; *a fit per margin*: plain runs, λ by
subgradient steps. Every front is solved exactly, as the conditional policy's (`family_front`).
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.family_front import MARGINS, front, values_of
from benchmarks.family_tasks import Task, recipe_of
from constrained_dpo import Run
from constrained_dpo.dual.exact import TabularWorld
from constrained_dpo.learners.embedded import EmbeddedValues
from constrained_dpo.problem import Constraint
from data_prep.models.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ROUNDS, STEPS = 4, 200  # of the conditional run
ENDS_ROUNDS = 2  # of each of the two ends: as many passes together
SINGLE = (0.45, 0.9, 1.35)  # margins of the plain runs, in shares of b; of MARGINS


def play_peers(output: Path, work: Path, worlds: list[str], seeds: list[int]) -> None:
    """Play the peers on worlds; one JSON line a world and seed, none twice."""
    lines = output.read_text().splitlines() if output.exists() else []
    done = [record.get("peers") for line in lines if (record := json.loads(line))]
    for seed in seeds:
        for world in worlds:
            if (key := {"world": world, "seed": seed}) in done:
                continue
            folder = work / f"peers-{world.replace(' ', '-')}-{seed}"
            fronts = _fronts(Task(world, seed=seed, setting="plain"), folder)
            with output.open("a") as handle:
                handle.write(json.dumps({"peers": key, "fronts": fronts}) + "\n")
            shutil.rmtree(folder)
            for name, rows in fronts.items():
                regrets = " ".join(f"{100 * row['regret']:.1f}" for row in rows)
                print(f"{world} {name}: regret {regrets} %", flush=True)


def _fronts(task: Task, folder: Path) -> dict[str, list[dict]]:
    prepared = Run.create(recipe_of(task), folder / "prepared")
    prepared.prepare()
    values, problem = values_of(prepared), prepared.recipe.problem
    world = values.world("dual", problem)
    (name,) = problem.names
    rise = float(problem.constraints[0].margin or 0.0)
    top = _at(world, float(MARGINS[-1]) * rise).exact_optimum.lambda_[name]
    ends = [
        _fixed(task, folder / f"end-{k}", {name: value}, prepared)
        for k, value in enumerate((0.0, top))
    ]
    tables = [values.logps("dual", end) for end in ends]
    size = values.learner.policy.model.config.vocab_size
    mixed = lambda share: decoded(tables, [1 - share, share], size - 1, values.length)
    soup = lambda share: _soup_logps(values, ends, share)
    return {
        "rewarded soups": front(world, soup, 1.0),
        "MOD": front(world, mixed, 1.0),
        "a fit per margin": _per_margin(task, folder, world, values),
    }


def _at(world: TabularWorld, margin: float) -> TabularWorld:
    """The world under another margin of its one constraint."""
    own = Constraint(world.problem.names[0], margin=margin)
    return replace(world, problem=replace(world.problem, constraints=(own,)))


def _fixed(task: Task, folder: Path, lambda_: dict[str, float], prepared: Run) -> Path:
    """Fit one end at its λ; return its last adapter."""
    recipe = recipe_of(task)
    recipe["dual"] |= {"method": "fixed", "init": lambda_}
    return _played(Run.create(recipe, folder, source=prepared), ENDS_ROUNDS)


def _played(run: Run, rounds: int) -> Path:
    while run.directory.rounds_done() < rounds:
        run.round()
    return run.directory.adapter_folder(rounds - 1)


def _per_margin(
    task: Task, folder: Path, world: TabularWorld, values: EmbeddedValues
) -> list[dict]:
    """Plain runs at three margins, with a third of the passes each."""
    (name,), rows = world.problem.names, []
    rise = float(world.problem.constraints[0].margin or 0.0)
    free = replace(world, problem=replace(world.problem, constraints=())).exact_optimum
    for share in SINGLE:
        recipe = recipe_of(task)
        recipe["objective"]["constraints"][0]["margin"] = share * rise
        recipe["fit"] |= {"steps": round(STEPS / len(SINGLE))}
        adapter = _played(Run.create(recipe, folder / f"margin-{share}"), ROUNDS)
        own = _at(world, share * rise)
        best = own.exact_optimum
        policy = own.evaluate(values.logps("dual", adapter), pd.Series(best.lambda_))
        gap = free.objective - free.reference.objective
        row = {"margin": share, "lambda_star": best.lambda_[name], "kl": policy.kl}
        row |= {"u_over_b": policy.u[name] / rise, "regret": policy.lagrangian_gap / gap}
        rows.append(row)
    return rows


def _soup_logps(values: EmbeddedValues, ends: list[Path], share: float) -> np.ndarray:
    """log π(y | x) of the policy whose weights lie between two adapters'."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((ends[0] / ADAPTER_CONFIG).read_text())
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    weights = [load_file(end / ADAPTER_WEIGHTS) for end in ends]
    joined = {}
    for name, first in weights[0].items():
        second, in_a = weights[1][name], ".lora_A." in name
        parts = [first, second] if in_a else [(1 - share) * first, share * second]
        joined[name] = np.ascontiguousarray(np.concatenate(parts, axis=0 if in_a else 1))
    with tempfile.TemporaryDirectory() as folder:
        save_file(joined, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (Path(folder) / ADAPTER_CONFIG).write_text(json.dumps(config))
        return values.logps("dual", Path(folder))


def decoded(tables: list[np.ndarray], weights: list[float], others: int, length: int) -> np.ndarray:
    """log-probabilities of answers whose tokens are drawn from the policies' next-token
    log-probabilities, mixed with weights and renormalized: (num_prompts, num_responses), as the
    tables, whose rows are ordered as in `enumerate_responses`. others: tokens beside the end."""
    steps = [_next_tokens(table, others, length) for table in tables]
    heads, rows = np.zeros((len(tables[0]), 1)), []
    for position in range(length):
        mixed = sum(w * part[position] for w, part in zip(weights, steps, strict=True))
        mixed = mixed - np.logaddexp.reduce(mixed, axis=2, keepdims=True)
        rows.append(heads + mixed[..., 0])
        heads = (heads[..., None] + mixed[..., 1:]).reshape(len(heads), -1)
    return np.concatenate([*rows, heads], axis=1)


def _next_tokens(table: np.ndarray, others: int, length: int) -> list[np.ndarray]:
    """By position the log-probabilities of the end and of every other token behind each prefix:
    (num_prompts, others^position, 1 + others)."""
    sizes = [others**position for position in range(length + 1)]
    ended = np.split(table, np.cumsum(sizes), axis=1)
    steps, mass = [], ended[length]
    for position in reversed(range(length)):
        following = mass.reshape(len(table), sizes[position], others)
        both = np.concatenate([ended[position][..., None], following], axis=2)
        mass = np.logaddexp.reduce(both, axis=2)
        steps.append(both - mass[..., None])
    return steps[::-1]
