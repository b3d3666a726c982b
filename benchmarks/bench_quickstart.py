"""`make bench`: quality on the embedded world, ours against the paper's setting, both scales, over
seeds; a markdown table on stdout.

Each row is a whole run (`cdpo init`, `cdpo run`) in its own process; the figures are the exact ones
of the last round's round.json.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.real_runs import play
from benchmarks.shares import share_closed
from tests.helpers import paths

PAPER = [
    "fit.labels=bernoulli",
    "fit.loss=logistic",
    "fit.group_size=2",
    "fit.pairs_per_prompt=270",
    "fit.batch_size=64",
]
PAPER += [
    "fit.learning_rate=2e-4",
    "pool.grow=false",
    "pool.shares=null",
    "policy.lora.target_modules=all-linear",
]
PAPER += ["dual.method=subgradient", "dual.step_size=0.3", "dual.step_schedule=constant"]
PAPER += ["dual.confidence_side=none", "fit.conditional=null", "fit.refresh=1"]
PAPER += ["fit.loraplus_ratio=1", "policy.lora.dropout=0.05"]
SETTINGS = {"ours": [], "paper": PAPER}
RECIPES = {"std 1, β 0.25": "quickstart.yaml", "std 10, β 0.1": "quickstart_std10.yaml"}


def one_run(folder: Path, recipe: str, setting: str, seed: int) -> dict:
    """Plays a recipe to its end; returns exact shares of the gap closed and exact u/b, by split, of
    the last round."""
    run = folder / f"{recipe}-{setting}-{seed}"
    records, optima = play(paths.RECIPES / recipe, run, [*SETTINGS[setting], f"seed={seed}"])
    last, result = records[-1], {"seed": seed, "recipe": recipe, "setting": setting}
    (name,) = last.lambda_
    margin = -optima["dual"].reference.u[name]
    for split in ("dual", "test"):
        closed = [share_closed(optima[split], r.exact[split]) for r in records]
        result[split] = {
            "closed": closed[-1],
            "u_over_b": last.exact[split].u[name] / margin,
            "by_round": closed,
        }
    result["lambda"], result["lambda_star"] = last.lambda_[name], optima["dual"].lambda_[name]
    result["kl"], result["verdict"] = last.exact["dual"].kl, last.verdict
    result["fit_seconds"] = sum(r.seconds["fit"] or 0 for r in records)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES.values()))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    tasks = [
        (r, s, seed)
        for r in arguments.recipes
        for s in arguments.settings
        for seed in arguments.seeds
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as threads:
        one_run_of = lambda task: one_run(Path(folder), *task)
        print(
            "| scale | setting | seed | gap closed, dual | gap closed, test | exact u/b, dual | "
            "exact u/b, test | λ | λ* | KL | verdict |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        scales = {file: scale for scale, file in RECIPES.items()}
        for result in threads.map(one_run_of, tasks):
            cells = [scales[result["recipe"]], result["setting"], str(result["seed"])]
            cells += [f"{100 * result[s]['closed']:.0f} %" for s in ("dual", "test")]
            cells += [f"{100 * result[s]['u_over_b']:+.1f} %" for s in ("dual", "test")]
            cells += [
                f"{result['lambda']:.3f}",
                f"{result['lambda_star']:.3f}",
                f"{result['kl']:.2f}",
                result["verdict"],
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
