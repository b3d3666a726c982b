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
import pandas as pd

from benchmarks.real_runs import play
from benchmarks.shares import share_closed
from constrained_dpo.dual.exact import ExactOptimum, ExactPolicy
from constrained_dpo.estimates.intervals import seeds_interval
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.recipe.methods import METHODS, method_overrides, uses_margins
from constrained_dpo.report.comparison_figures import draw_achieved, draw_front
from constrained_dpo.report.drawing import LIGHT, render
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
NAMES = {
    "mocan": "MoCAN (one-shot)",
    "caid": "CAID (multi-shot)",
    "pecan": "PeCAN (one-shot)",
    "pecaid": "PeCAID (multi-shot)",
    "ours": "ours (soft, pool grows)",
    "weighted_sum": "weighted sum",
    "dpo_helpful": "DPO on helpful",
    "dpo_harmless": "DPO on harmless",
}
IMPLICIT = {"pecan": "mocan", "pecaid": "caid"}
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


def is_constrained(method: str) -> bool:
    return method in IMPLICIT or uses_margins(method)


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


def points(results: list[dict], split: str) -> pd.DataFrame:
    """The table that the figures of `cdpo compare` are drawn from: exact gains of the last round,
    mean and t-interval over seeds; in units of the std 1 world."""
    rows = []
    for method in NAMES:
        played = [r for r in results if r["task"][1] == method]
        for value in sorted({r["task"][2] for r in played}):
            alike = [r for r in played if r["task"][2] == value]
            row = {
                "method": NAMES[method],
                "setting": (value,),
                "fixed": not is_constrained(method),
                "runs": len(alike),
                "alone": method.removeprefix("dpo_") if method.startswith("dpo_") else None,
            }
            for name in ("helpful", "harmless", "kl"):
                values = [r["rounds"][-1][split][name] for r in alike]
                ends = seeds_interval(values, 0.95) if len(values) > 1 else (values[0],) * 3
                row |= dict(
                    zip((f"gain_{name}", f"low_{name}", f"high_{name}"), ends, strict=True)
                ) | {f"exact_{name}": np.nan}
                row[f"best_{name}"] = (
                    np.mean([r["best"][split][name] for r in alike])
                    if uses_margins(method)
                    else np.nan
                )
            row["demanded_harmless"] = value if is_constrained(method) else np.nan
            row["closed"] = (
                np.mean([r["closed"][split] for r in alike]) if uses_margins(method) else np.nan
            )
            rows.append(row)
    return pd.DataFrame(rows)


def distances(results: list[dict], split: str) -> dict[str, dict[tuple[float, int], float]]:
    """|gain/b − 1| of every run that looks at margins, by method and (margin, seed)."""
    far: dict[str, dict[tuple[float, int], float]] = {}
    for result in results:
        _, method, value, seed = result["task"]
        if is_constrained(method):
            far.setdefault(method, {})[value, seed] = abs(
                result["rounds"][-1][split]["harmless"] / value - 1
            )
    return far


def report(results: list[dict], output: Path | None) -> None:
    for scale in dict.fromkeys(r["task"][0] for r in results):
        played = [r for r in results if r["task"][0] == scale]
        for split in ("dual", "test"):
            table = points(played, split)
            print(f"\n{scale}, {split} prompts: exact, mean [95 % interval over seeds]\n")
            print(
                "| method | b or λ | seeds | gain of harmless | change of helpful | KL | of the "
                "way to P* |\n" + "|---" * 7 + "|"
            )
            for _, r in table.iterrows():
                cells = [f"{r[f'gain_{n}']:+.3f}" for n in ("harmless", "helpful")]
                if r["runs"] > 1:
                    cells = [
                        f"{r[f'gain_{n}']:+.3f} [{r[f'low_{n}']:+.3f}, {r[f'high_{n}']:+.3f}]"
                        for n in ("harmless", "helpful")
                    ]
                demanded = "–" if pd.notna(r["alone"]) else f"{r['setting'][0]:g}"
                closed = "–" if np.isnan(r["closed"]) else f"{100 * r['closed']:.0f} %"
                print(
                    f"| {r['method']} | {demanded} | {r['runs']} | {' | '.join(cells)} | "
                    f"{r['gain_kl']:.2f} | {closed} |"
                )
            far = distances(played, split)
            print()
            for method, values in far.items():
                mean, most = 100 * np.mean(list(values.values())), 100 * max(values.values())
                line = (
                    f"{NAMES[method]}: |gain/b − 1| {mean:.1f} % in the mean, {most:.0f} % at most"
                )
                against = "pecan" if method == "pecaid" else "mocan"
                nearer: dict[
                    int, list[float]
                ] = {}  # by seed: the runs of one seed share its pool and are not independent
                for key in values.keys() & far.get(against, {}).keys():
                    nearer.setdefault(key[1], []).append(far[against][key] - values[key])
                if method not in ("mocan", "pecan") and len(nearer) > 1:
                    mean, low, high = (
                        100 * v for v in seeds_interval([np.mean(v) for v in nearer.values()], 0.95)
                    )
                    wins = sum(v > 0 for differences in nearer.values() for v in differences)
                    line += (
                        f"; nearer than {NAMES[against]} by {mean:+.1f} % of b [{low:+.1f}, "
                        f"{high:+.1f}] over {len(nearer)} seeds, "
                    )
                    line += f"in {wins} of {sum(map(len, nearer.values()))} pairs of runs"
                print(line)
            if output:
                draw(table, output, f"methods_{scale.replace(' ', '')}_{split}")


def draw(table: pd.DataFrame, output: Path, stem: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    colours = {method: index for index, method in enumerate(NAMES.values())}
    demanding = table[~table["fixed"]]
    if len(demanding):
        figure = render(lambda style: draw_achieved(style, demanding, "harmless", colours), LIGHT)
        (output / f"{stem}_achieved.png").write_bytes(figure)
    (output / f"{stem}_front.png").write_bytes(
        render(lambda style: draw_front(style, table, ("harmless", "helpful"), colours), LIGHT)
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
