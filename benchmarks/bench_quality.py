"""`make bench-quality`: how much of the gap to the exact constrained optimum each way of
fitting closes, at equal passes.

    python -m benchmarks.bench_quality runs FILE.jsonl [--settings ...] [--worlds ...]
        [--scales ...] [--seeds ...]          # goes on where FILE stops
    python -m benchmarks.bench_quality table FILE.jsonl

Whole runs of seven rounds on enumerable worlds: the embedded one and five with random rewards
and utilities on its policy and prompts, at score std 1 / β 0.25 and at std 10 / β 0.1. Every
setting makes 200 steps of 128 sequences a round. λ moves by subgradient steps of
quickstart.yaml's size, which shrink at std 10; figures are exact ones of the last round on the
dual prompts. The adapter is that recipe's, with a layer on the language-model head
(`--without-head`: on the linear layers below it alone, as `all-linear` means).
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks.real_runs import play
from benchmarks.shares import share_closed
from constrained_dpo.dual.exact import ExactOptimum
from constrained_dpo.run.record import RoundRecord
from tests.helpers.paths import QUICKSTART, REPO

GROUPS = {"group_size": 8, "groups_per_prompt": 67, "batch_size": 16}
SHARES = {"reference": 0.2, "recent": 0.4, "hard": 0.0, "earlier": 0.4}
RECENT = {"reference": 0.1, "recent": 0.7, "hard": 0.0, "earlier": 0.2}
SETTINGS: dict[str, dict[str, dict]] = {
    "paper": {"fit": {"labels": "bernoulli"}, "pool": {"grow": False}},
    "soft": {"pool": {"grow": False}},
    "soft, pool grows": {},
    "groups, recent, 1e-3": {"fit": GROUPS | {"learning_rate": 1e-3}, "pool": {"shares": RECENT}},
    "listwise, recent, 2e-3": {
        "fit": GROUPS | {"loss": "listwise", "learning_rate": 2e-3},
        "pool": {"shares": RECENT},
    },
}
MORE = {
    "groups, shares, 5e-4": {"fit": GROUPS | {"learning_rate": 5e-4}, "pool": {"shares": SHARES}}
}  # in the grid only where --settings names it
WITH_HEAD = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
SCALES = {
    "std 1": (1, 0.25, "constant"),
    "std 10": (10, 0.1, "inverse_sqrt"),
}  # of scores, β, dual.step_schedule
WORLDS = ("embedded", "random 1", "random 2", "random 3", "random 4", "random 5")


def recipe_of(setting: str, world: str, scale: str, seed: int, head: bool = True) -> dict:
    factor, beta, schedule = SCALES[scale]
    recipe = yaml.safe_load(QUICKSTART.read_text()) | {"seed": seed}
    recipe["dual"]["step_schedule"], suffix = schedule, "" if factor == 1 else "_x10"
    if world == "embedded":
        recipe["objective"]["beta"] = beta
        for objective in (recipe["objective"]["reward"], *recipe["objective"]["constraints"]):
            objective["scorer"]["target"] += suffix
            objective |= {"margin": factor * objective["margin"]} if "margin" in objective else {}
    else:
        number = world.split()[1]
        scorer = lambda name: {
            "type": "python",
            "target": f"{REPO / 'tests' / 'helpers' / 'worlds.py'}:{name}{suffix}",
        }
        constraint = {"name": "g", "margin": 0.5 * factor, "scorer": scorer(f"utility_{number}a")}
        recipe["objective"] = {
            "beta": beta,
            "reward": {"name": "r", "scorer": scorer(f"reward_{number}")},
            "constraints": [constraint],
        }
    for block, changes in (SETTINGS | MORE)[setting].items():
        recipe[block] = recipe.get(block, {}) | changes
    if head:
        recipe["policy"]["lora"]["target_modules"] = WITH_HEAD
    recipe["prompts"]["max_test"] = 4  # the test prompts play no part here
    return recipe


def play_runs(output: Path, tasks: list[tuple[str, str, str, int]], head: bool) -> None:
    """One JSON line a run: the task, and by round the share of the gap closed, exact u/b and KL,
    and the certificate.

    Runs of one world, scale and seed start from the same samples of π_ref.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {tuple(json.loads(line)["task"]) for line in output.read_text().splitlines()}
        if output.exists()
        else set()
    )
    left = [task for task in tasks if task not in done]
    for _, alike in itertools.groupby(left, key=lambda task: task[1:]):
        with tempfile.TemporaryDirectory() as name:
            folder, prepared = Path(name), None
            for task in alike:
                (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(*task, head=head)))
                started = time.perf_counter()
                records, optima = play(
                    folder / "recipe.yaml", folder / task[0], [], start_from=prepared
                )
                prepared = prepared or folder / task[0]
                rounds = rows_of(records, optima["dual"])
                with output.open("a") as lines:
                    lines.write(
                        json.dumps(
                            {"task": task, "lambda_star": optima["dual"].lambda_, "rounds": rounds}
                        )
                        + "\n"
                    )
                seconds = time.perf_counter() - started
                closed = [round(r["closed"], 3) for r in rounds]
                last = f"u/b {rounds[-1]['u_over_b']:+.3f}, {seconds:.0f} s"
                print(task, closed, last, flush=True)


def rows_of(records: list[RoundRecord], optimum: ExactOptimum) -> list[dict]:
    """Of every round's record what the tables are made of."""
    rounds = []
    for record in records:
        exact = record.exact["dual"]
        ((constraint, u),) = exact.u.items()
        rounds.append(
            {
                "closed": share_closed(optimum, exact),
                "u_over_b": u / -optimum.reference.u[constraint],
                "kl": exact.kl,
                "exact_gap": exact.lagrangian_gap,
                "lagrangian_gap": record.lagrangian_gap,
                "lagrangian_gap_se": record.lagrangian_gap_se,
                "lagrangian_gap_low": record.lagrangian_gap_low,
                "lagrangian_gap_high": record.lagrangian_gap_high,
                "ess": record.ess,
                "residual": record.residual,
                "lambda": record.lambda_,
                "seconds": record.seconds,
            }
        )
    return rounds


def print_tables(results: list[dict]) -> None:
    for scale in SCALES:
        print(f"\n{scale}: gap closed in the last round, by seed (u/b)\n")
        print(
            "| setting | "
            + " | ".join(WORLDS)
            + " | median, worst | worst u/b |\n"
            + "|---" * (len(WORLDS) + 3)
            + "|"
        )
        for setting in SETTINGS | MORE:
            played = [r for r in results if r["task"][0] == setting and r["task"][2] == scale]
            if not played:
                continue
            cells = []
            for world in WORLDS:
                last = [
                    r["rounds"][-1]
                    for r in sorted(played, key=lambda r: r["task"][3])
                    if r["task"][1] == world
                ]
                cells.append(
                    ", ".join(
                        f"{100 * r['closed']:.0f} % ({100 * r['u_over_b']:+.0f} %)" for r in last
                    )
                    or "not run"
                )
            closed = [r["rounds"][-1]["closed"] for r in played]
            worst = min(r["rounds"][-1]["u_over_b"] for r in played)
            summary = (
                f"{100 * np.median(closed):.0f} %, {100 * min(closed):.0f} % | {100 * worst:+.0f} %"
            )
            print(f"| {setting} | {' | '.join(cells)} | {summary} |")
        rounds = [r for result in results if result["task"][2] == scale for r in result["rounds"]]
        certified = [r for r in rounds if r["lagrangian_gap"] is not None]
        covered = sum(
            r["exact_gap"] <= r["lagrangian_gap"] + 2 * r["lagrangian_gap_se"] for r in certified
        )
        print(
            f"\ncertificate: exact gap ≤ reported + 2 SE in {covered} of {len(certified)} rounds; "
            f"null in {len(rounds) - len(certified)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs")
    runs.add_argument("output", type=Path)
    runs.add_argument("--settings", nargs="+", choices=SETTINGS | MORE, default=list(SETTINGS))
    runs.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    runs.add_argument("--scales", nargs="+", choices=SCALES, default=list(SCALES))
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--without-head", action="store_true")
    commands.add_parser("table").add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print_tables([json.loads(line) for line in arguments.output.read_text().splitlines()])
        return
    order = [
        (t, w, c, s)
        for s in arguments.seeds
        for w in arguments.worlds
        for c in arguments.scales
        for t in arguments.settings
    ]
    play_runs(arguments.output, order, head=not arguments.without_head)


if __name__ == "__main__":
    main()
