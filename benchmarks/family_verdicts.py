"""`bench_family verdicts`: what quickstart says on its test prompts, and whether it is true."""

import json
import shutil
from pathlib import Path

from benchmarks.shares import share_closed
from constrained_dpo import Run
from constrained_dpo.run.record import read_optimum
from tests.helpers.paths import RECIPES


def play_verdicts(output: Path, work: Path, seeds: list[int]) -> None:
    """Play recipes/quickstart.yaml to its end; one JSON line a seed, none twice."""
    lines = output.read_text().splitlines() if output.exists() else []
    done = [record.get("quickstart") for line in lines if (record := json.loads(line))]
    for seed in seeds:
        if (key := {"seed": seed}) in done:
            continue
        folder = work / f"quickstart-{seed}"
        run = Run.create(str(RECIPES / "quickstart.yaml"), folder, overrides=[f"seed={seed}"])
        run.play()
        best = (read_optimum(run.directory) or {})["test"]
        (name,), rounds = run.recipe.problem.names, []
        for number in range(run.directory.rounds_done()):
            record = run.record(number)
            exact = record.exact_on("test")
            row = {"verdict": record.verdict, "lambda": record.policy_lambda[name]}
            row |= {"exact_u": exact.u[name], "closed": share_closed(best, exact)}
            rounds.append(row)
        with output.open("a") as handle:
            handle.write(json.dumps({"quickstart": key, "rounds": rounds}) + "\n")
        shutil.rmtree(folder)
        print(f"quickstart seed {seed}: {rounds[-1]}", flush=True)


def print_verdicts(records: list[dict]) -> None:
    """Print each seed's verdict by round, the exact slack beside it."""
    if not records:
        return
    last = [record["rounds"][-1] for record in records]
    satisfied = [row for row in last if row["verdict"] == "satisfied"]
    true = sum(row["exact_u"] >= 0 for row in satisfied)
    print(
        f"\n**Quickstart's verdicts**: *satisfied* in {len(satisfied)} of {len(last)} runs, true "
        f"in {true} of those. By round: verdict, exact u on the test prompts, gap closed\n"
    )
    rounds = range(max(len(record["rounds"]) for record in records))
    print("| seed | " + " | ".join(map(str, rounds)) + " |\n" + "|---" * (len(rounds) + 1) + "|")
    for record in sorted(records, key=lambda record: record["quickstart"]["seed"]):
        cells = [
            f"{row['verdict']}, {row['exact_u']:+.3f}, {100 * row['closed']:.0f} %"
            for row in record["rounds"]
        ]
        print(f"| {record['quickstart']['seed']} | " + " | ".join(cells) + " |")
