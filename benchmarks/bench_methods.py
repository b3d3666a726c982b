"""`make bench-methods`: the papers' figures on the embedded world, where every gain and every
optimum is exact.

    python -m benchmarks.bench_methods runs FILE.jsonl
        [--methods ...] [--margins ...] [--seeds ...]
    python -m benchmarks.bench_methods report FILE.jsonl [--figures docs/figures]  # tables, PNGs

Achieved against demanded b and the trade-off front of MoCAN, CAID, PeCAN, PeCAID, weighted
sums, DPO on one objective and our own settings, with error bars over seeds. Real NF4 LoRA fits,
all with the same rounds, steps and samples (SETTINGS); only what makes the method differs
(constrained_dpo/recipe/methods.py). Gains are those of the last round's policy by enumeration:
on the dual prompts, which λ is steered on, and on the test prompts. PeCAN and PeCAID see no
scores: two adapters fitted by DPO on drawn labels (this world's people; one fit of PREALIGN per
objective and seed, kept beside FILE) are their implicit scorers, b is demanded of those, and the
gains shown are those of the true scores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.methods_report import IMPLICIT, NAMES, is_constrained, report
from benchmarks.real_runs import play
from benchmarks.shares import share_closed
from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import METHODS, method_overrides
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import read_optimum
from tests.helpers.paths import RECIPES

SETTINGS = (
    *(
        "sampling.responses_per_prompt=32",
        "dual.responses_per_prompt=64",
        "fit.steps=100",
        "fit.learning_rate=3e-4",
    ),
    *(
        "dual.rounds=6",
        "dual.step_size=0.6",
        "dual.step_schedule=constant",
        "policy.lora.target_modules=all-linear",
    ),
    *(
        "fit.loss=logistic",
        "fit.group_size=2",
        "fit.batch_size=64",
        "fit.pairs_per_prompt=270",
        "pool.shares=null",
    ),
)
SCALES = {"std 1": ("quickstart.yaml", 1.0), "std 10": ("quickstart_std10.yaml", 10.0)}
PREALIGN = ("dual.rounds=1", "fit.steps=600", "fit.labels=bernoulli", "pool.grow=false")
EXPECTED = 75.0  # seconds of a run on one core, before any has been timed


def tasks(arguments: argparse.Namespace) -> list[tuple[str, str, float, int]]:
    """(scale, method, margin or weight, seed); a method of one objective has no setting: 0."""
    settings = {"weighted_sum": arguments.weights}
    return [
        (scale, method, value, seed)
        for seed in arguments.seeds
        for scale in arguments.scales
        for method in arguments.methods
        for value in (arguments.margins if is_constrained(method) else settings.get(method, [0.0]))
    ]


def prealigned(scale: str, seed: int, folder: Path) -> dict[str, Path]:
    """Runs of DPO on one objective's drawn labels, by objective; played where they are not there
    yet."""
    path = RECIPES / SCALES[scale][0]
    runs = {}
    for name in ("helpful", "harmless"):
        runs[name] = folder / f"{scale}-seed{seed}-{name}".replace(" ", "")
        play(
            path,
            runs[name],
            [
                *SETTINGS,
                *method_overrides(f"dpo_{name}", load_recipe(path, SETTINGS)),
                *PREALIGN,
                f"seed={seed}",
            ],
        )
    return runs


TRUE_VALUES = """
import json, sys
from pathlib import Path
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.directory import RunDirectory
run = RunDirectory(sys.argv[1])
recipe = run.recipe()
learner, problem = LoraLearner(recipe, run.prompts(), run.score_cache), recipe.problem
zeros = problem.multipliers(dict.fromkeys(problem.names, 0.0))
values = [learner.exact.policy(Path(adapter), zeros, problem) for adapter in sys.argv[2:]]
print(json.dumps([{split: v.to_json() for split, v in by_split.items()} for by_split in values]))
"""


def true_values(judge: Path, adapters: list[Path]) -> list[dict[str, ExactPolicy]]:
    """Exact values of adapters under the scorers of the run `judge`, by split."""
    command = [sys.executable, "-c", TRUE_VALUES, str(judge), *map(str, adapters)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [
        {split: ExactPolicy.from_json(content) for split, content in by_split.items()}
        for by_split in json.loads(done.stdout)
    ]


def one_run(scale: str, method: str, value: float, seed: int, folder: Path) -> dict:
    """Plays a run; by split and round the exact gains over π_ref by objective (score units), KL
    (nats), and those of the exact optimum."""
    file, factor = SCALES[scale]
    path = RECIPES / file
    recipe = load_recipe(path, SETTINGS)
    overrides = [
        *SETTINGS,
        *method_overrides(IMPLICIT.get(method, method), recipe, {"harmless": value}),
        f"seed={seed}",
    ]
    judges = prealigned(scale, seed, folder) if method in IMPLICIT else {}
    for key, name in (
        (("reward", "helpful"), ("constraints.harmless", "harmless")) if judges else ()
    ):
        scorer = {
            "type": "implicit",
            "adapter": str(judges[name] / "rounds/000/adapter"),
            "beta": recipe.objective.beta,
        }
        overrides.append(f"objective.{key}.scorer={json.dumps(scorer)}")
    if is_constrained(method):
        overrides.append(f"objective.constraints.harmless.margin={value * factor}")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        records, optima = play(path, run, overrides)
        if judges:  # what the implicit scores say of themselves is not measured here
            exact = true_values(
                judges["helpful"], [run / f"rounds/{r.round:03d}/adapter" for r in records]
            )
            optima = read_optimum(RunDirectory(judges["helpful"]))
        else:
            exact = [r.exact for r in records]

    def gains(values: ExactPolicy, optimum: ExactOptimum) -> dict[str, float]:
        """By objective, whichever of the two is the run's reward."""
        base = optimum.reference
        (utility,) = base.utilities
        reward = "helpful" if utility == "harmless" else "harmless"
        moved = {
            reward: values.reward - base.reward,
            utility: values.utilities[utility] - base.utilities[utility],
        }
        return {name: moved[name] / factor for name in sorted(moved)} | {"kl": values.kl}

    return {
        "task": [scale, method, value, seed],
        "seconds": round(time.perf_counter() - start, 1),
        "lambda": records[-1].lambda_,
        "lambda_star": None if judges else optima["dual"].lambda_,
        "rounds": [
            {split: gains(values[split], best) for split, best in optima.items()}
            for values in exact
        ],
        "best": None
        if judges
        else {split: gains(best.optimal, best) for split, best in optima.items()},
        "closed": None
        if judges
        else {split: share_closed(best, exact[-1][split]) for split, best in optima.items()},
    }


def play_runs(output: Path, grid: list[tuple[str, str, float, int]]) -> None:
    """One JSON line a run, what is there already left out; says first how long the rest takes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    earlier = (
        [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    )
    left = [task for task in grid if list(task) not in [r["task"] for r in earlier]]
    each = np.mean([r["seconds"] for r in earlier]) if earlier else EXPECTED
    print(
        f"{len(left)} of {len(grid)} runs to play, about {len(left) * each / 60:.0f} minutes at "
        f"{each:.0f} s a run",
        flush=True,
    )
    for number, task in enumerate(left, 1):
        result = one_run(*task, output.with_suffix(""))
        with output.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        reached = {split: round(v["harmless"], 3) for split, v in result["rounds"][-1].items()}
        print(
            f"{number}/{len(left)}",
            task,
            "gain of harmless",
            reached,
            f"{result['seconds']:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs")
    runs.add_argument("output", type=Path)
    runs.add_argument("--scales", nargs="+", choices=SCALES, default=["std 1"])
    runs.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    runs.add_argument(
        "--margins",
        type=float,
        nargs="+",
        default=[0.2, 0.5, 0.8],
        help="in units of the std 1 world",
    )
    runs.add_argument("--weights", type=float, nargs="+", default=[0.3, 0.8, 1.5])
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    shown = commands.add_parser("report")
    shown.add_argument("output", type=Path)
    shown.add_argument("--figures", type=Path, help="folder for the PNGs")
    arguments = parser.parse_args()
    if arguments.command == "runs":
        play_runs(arguments.output, tasks(arguments))
    else:
        report(
            [json.loads(line) for line in arguments.output.read_text().splitlines()],
            arguments.figures,
        )


if __name__ == "__main__":
    assert set(NAMES) >= set(METHODS) - {"recipe"}
    main()
