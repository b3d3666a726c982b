"""`make bench-dual`: rounds of the dual steps and the certificate on enumerable worlds with real LoRA fits.

    python tests/bench_dual.py fits FILE.jsonl                  # real runs (hours on one core); goes on where FILE stops
    python tests/bench_dual.py table FILE.jsonl [--plot PNG]    # the tables of rounds and of the certificate from it

Rounds are counted until the exact u of the round's policy is within 5 % of the margin for every constraint (or λ = 0 and u > 0).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import yaml
from real_runs import play

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
    "embedded, β 1": _embedded("", 1.0, {"harmless": 0.3}),  # where fits come close enough to their maximizer to test small gaps
    "embedded std 10": _embedded("_x10", 0.1, {"harmless": 5.0}),
}


def met(exact: dict, lambda_: dict, margins: dict[str, float]) -> bool:
    """Every exact u within 5 % of its margin, or λ = 0 with room."""
    return all(abs(u) <= CLOSE * margins[n] or (lambda_[n] <= 0 and u > 0) for n, u in exact["u"].items())


def tasks(seeds: list[int], methods: list[str], worlds: list[str], steps: list[float]) -> list[tuple[str, str, float, str, int, int]]:
    """(world, method, step size, init, seed, rounds): newton from both starts, the subgradient with the step sizes."""
    chosen = []
    if "newton" in methods:
        starts = (("zeros", 5), ("one_shot", 3))
        chosen += [(world, "newton", 0.3, init, seed, rounds) for seed in seeds for world in worlds for init, rounds in starts]
    if "subgradient" in methods:
        few = [world for world in worlds if "std 10" not in world and "β 1" not in world]
        chosen += [(world, "subgradient", step, "zeros", seed, 5) for seed in seeds for world in few for step in steps]
    return chosen


def play_fits(output: Path, chosen: list[tuple]) -> None:
    """Real runs; one JSON line each: the task, and per round λ, exact values and what the certificate said."""
    output.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(json.loads(line)["task"]) for line in output.read_text().splitlines()} if output.exists() else set()
    for task in chosen:
        if task in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            records = _play(Path(folder), *task)
        with output.open("a") as lines:
            lines.write(json.dumps({"task": task, "rounds": records}) + "\n")
        print(task, [{n: round(u, 3) for n, u in r["exact"]["u"].items()} for r in records], flush=True)


def _play(folder: Path, world: str, method: str, step: float, init: str, seed: int, rounds: int) -> list[dict]:
    recipe = yaml.safe_load((REPO / "tests" / "data" / "quickstart_pairs.yaml").read_text())
    recipe |= {"objective": WORLDS[world], "seed": seed}
    recipe["dual"] |= {"method": method, "step_size": step, "init": init, "rounds": rounds}
    recipe["dual"]["responses_per_prompt"] = recipe["sampling"]["responses_per_prompt"] = 128
    recipe["prompts"] |= {"max_fit": 24, "max_test": 4}  # the test prompts play no part here
    recipe["fit"] |= {"steps": 300, "learning_rate": 5e-4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    records, optima = play(folder / "recipe.yaml", folder / "run", [])
    optimum, kept = optima["dual"], []
    for record in records:
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


def _counts(values: list[int | None]) -> str:
    """Median and all values; a run that did not get there counts as more than it played."""
    ranked = sorted(np.inf if v is None else v for v in values)
    median = np.median(ranked)
    return f"{'>' if np.isinf(median) else f'{median:g}'} ({', '.join('–' if v is None else str(v) for v in values)})"


def print_rounds(results: list[dict]) -> None:
    print(
        "| world | newton from 0 | newton from one_shot | subgradient from 0, by η: "
        + ", ".join(f"{s:g}" for s in STEPS)
        + " |\n|---|---|---|---|"
    )
    for world in WORLDS:
        cells = []
        for method, init, step in (("newton", "zeros", 0.3), ("newton", "one_shot", 0.3), *(("subgradient", "zeros", s) for s in STEPS)):
            chosen = [r for r in results if r["task"][:4] == [world, method, step, init]]
            cells.append(_counts([rounds_needed(r["rounds"], world) for r in chosen]) if chosen else "not run")
        print(f"| {world} | {cells[0]} | {cells[1]} | {'; '.join(cells[2:])} |")


def print_certificate(results: list[dict], plot: Path | None) -> None:
    """Exact gap against the reported one, by scale; a round's exact gap is that of its dual prompts."""
    scale_of = {world: "std 10, β 0.1" if "std 10" in world else "std 1, β 1" if "β 1" in world else "std 1, β 0.25" for world in WORLDS}
    rows = []
    for result in results:
        rows += [r | {"scale": scale_of[result["task"][0]], "exact_gap": r["exact"]["lagrangian_gap"]} for r in result["rounds"]]
    columns = ("scale", "rounds", "null", "exact ≤ reported + 2 SE", "exact gap 0.02–0.2: rounds, within ±30 %", "median reported/exact")
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for scale in sorted({r["scale"] for r in rows}):
        mine = [r for r in rows if r["scale"] == scale]
        known = [r for r in mine if r["lagrangian_gap"] is not None]
        exact, said, se = (np.array([r[key] for r in known]) for key in ("exact_gap", "lagrangian_gap", "lagrangian_gap_se"))
        narrow = (exact >= 0.02) & (exact <= 0.2)
        close = int((np.abs(said[narrow] / exact[narrow] - 1) <= 0.3).sum())
        covered = f"{int((exact <= said + 2 * se).sum())} of {len(known)}"
        ratio = f"{np.median(said / exact):.2f}" if len(known) else "–"
        print(f"| {scale} | {len(mine)} | {len(mine) - len(known)} | {covered} | {int(narrow.sum())}, {close} | {ratio} |")
    if plot is not None:
        _plot(rows, plot)


def _plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    for scale, marker in (("std 1, β 1", "^"), ("std 1, β 0.25", "o"), ("std 10, β 0.1", "s")):
        known = [r for r in rows if r["scale"] == scale and r["lagrangian_gap"] is not None]
        exact, said = ([r[key] for r in known] for key in ("exact_gap", "lagrangian_gap"))
        se = [2 * r["lagrangian_gap_se"] for r in known]
        axes.errorbar(exact, said, yerr=se, fmt=marker, markersize=4, capsize=2, linewidth=1, label=scale)
    axes.axline((1, 1), slope=1, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="exact Lagrangian gap (score units)", ylabel="estimated, ± 2 SE")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fits = commands.add_parser("fits")
    fits.add_argument("output", type=Path)
    fits.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    fits.add_argument("--methods", nargs="+", choices=("newton", "subgradient"), default=["newton", "subgradient"])
    fits.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    fits.add_argument("--steps", type=float, nargs="+", default=list(STEPS), help="the subgradient's step sizes")
    table = commands.add_parser("table")
    table.add_argument("output", type=Path)
    table.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "fits":
        play_fits(arguments.output, tasks(arguments.seeds, arguments.methods, arguments.worlds, arguments.steps))
        return
    results = [json.loads(line) for line in arguments.output.read_text().splitlines()]
    print_rounds(results)
    print_certificate(results, arguments.plot)


if __name__ == "__main__":
    main()
