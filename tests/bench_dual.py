"""`make bench-dual`: dual steps compared by rounds, on simulated learners and on enumerable worlds with real LoRA fits.

    python tests/bench_dual.py simulate          # seconds per run: minutes in all
    python tests/bench_dual.py fits FILE.jsonl   # real runs (about two hours); goes on where FILE stops
    python tests/bench_dual.py table FILE.jsonl  # the tables of rounds and of the certificate from it

Rounds are counted until the exact u of the round's policy is within 5 % of the margin for every constraint (or λ = 0 and u > 0).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parents[1]
STEPS = (0.1, 0.3, 1.0, 3.0, 10.0)
CLOSE = 0.05


def _python(function: str) -> dict:
    return {"type": "python", "target": function}


def _random_world(seed: int, letters: str) -> dict:
    file = str(REPO / "tests" / "worlds.py")
    constraints = [{"name": f"g{c}", "margin": 0.5, "scorer": _python(f"{file}:utility_{seed}{c}")} for c in letters]
    return {"beta": 0.25, "reward": {"name": "r", "scorer": _python(f"{file}:reward_{seed}")}, "constraints": constraints}


def _embedded(suffix: str, beta: float, margins: dict[str, float]) -> dict:
    target = lambda name: _python(f"data_prep.quickstart:{name}{suffix}")  # noqa: E731
    constraints = [{"name": n, "margin": b, "scorer": target(n)} for n, b in margins.items()]
    return {"beta": beta, "reward": {"name": "helpful", "scorer": target("helpful")}, "constraints": constraints}


WORLDS = {
    "embedded": _embedded("", 0.25, {"harmless": 0.5}),
    "embedded, two": _embedded("", 0.25, {"harmless": 0.5, "humor": 0.3}),
    "random 1": _random_world(1, "a"),
    "embedded std 10": _embedded("_x10", 0.1, {"harmless": 5.0}),
}


def met(exact: dict, lambda_: dict, margins: dict[str, float]) -> bool:
    """Every exact u within 5 % of its margin, or λ = 0 with room."""
    return all(abs(u) <= CLOSE * margins[n] or (lambda_[n] <= 0 and u > 0) for n, u in exact["u"].items())


def tasks(seeds: list[int]) -> list[tuple[str, str, float, str, int, int]]:
    """(world, method, step size, init, seed, rounds): newton with every seed, the five subgradient step sizes with the first one."""
    chosen = []
    for seed in seeds:
        for world in WORLDS:
            chosen += [(world, "newton", 0.3, init, seed, rounds) for init, rounds in (("zeros", 5), ("one_shot", 3))]
        if seed == seeds[0]:
            chosen += [(world, "subgradient", step, "zeros", seed, 5) for world in WORLDS if "std 10" not in world for step in STEPS]
    return chosen


def play_fits(output: Path, seeds: list[int]) -> None:
    """Real runs; one JSON line each: the task, and per round λ, exact values and what the certificate said."""
    done = {tuple(json.loads(line)["task"]) for line in output.read_text().splitlines()} if output.exists() else set()
    for task in tasks(seeds):
        if task in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            records = _play(Path(folder), *task)
        with output.open("a") as lines:
            lines.write(json.dumps({"task": task, "rounds": records}) + "\n")
        print(task, [{n: round(u, 3) for n, u in r["exact"]["u"].items()} for r in records], flush=True)


def _play(folder: Path, world: str, method: str, step: float, init: str, seed: int, rounds: int) -> list[dict]:
    recipe = yaml.safe_load((REPO / "recipes" / "quickstart.yaml").read_text())
    recipe |= {"objective": WORLDS[world], "seed": seed}
    recipe["dual"] |= {"method": method, "step_size": step, "init": init, "rounds": rounds}
    recipe["dual"]["responses_per_prompt"] = recipe["sampling"]["responses_per_prompt"] = 128
    recipe["prompts"] |= {"max_fit": 24, "max_test": 4}  # the test prompts play no part here
    recipe["fit"] |= {"steps": 150, "learning_rate": 3e-4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cdpo = [sys.executable, "-c", "from constrained_dpo.cli import main; main()"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "check": True}
    run = folder / "run"
    subprocess.run([*cdpo, "init", str(folder / "recipe.yaml"), str(run)], **quiet)
    subprocess.run([*cdpo, "run", str(run)], **quiet)
    optimum, kept = json.loads((run / "exact.json").read_text())["dual"], []
    for file in sorted(run.glob("rounds/*/round.json")):
        record = json.loads(file.read_text())
        exact = record["exact"]["dual"]
        lagrangian = exact["objective"] + sum(record["lambda"][n] * u for n, u in exact["u"].items())
        keys = (
            "lambda",
            "u",
            "u_se",
            "step",
            "objective",
            "lagrangian",
            "dual_value",
            "dual_value_source",
            "dual_values",
            "lagrangian_gap",
        )
        more = ("lagrangian_gap_se", "optimality_gap", "ess", "residual", "response_factor", "disagreement", "verdict", "seconds")
        row = {key: record[key] for key in (*keys, *more)}
        kept.append(row | {"exact": exact, "exact_lagrangian": lagrangian, "optimum": optimum["objective"]})
    return kept


def rounds_needed(records: list[dict], world: str) -> int | None:
    margins = {c["name"]: c["margin"] for c in WORLDS[world]["constraints"]}
    hits = [t for t, r in enumerate(records) if met(r["exact"], r["lambda"], margins)]
    return hits[0] + 1 if hits else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fits = commands.add_parser("fits")
    fits.add_argument("output", type=Path)
    fits.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    if arguments.command == "fits":
        play_fits(arguments.output, arguments.seeds)


if __name__ == "__main__":
    main()
