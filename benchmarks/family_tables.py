"""Tables of bench_family: every row of the aims, and the runs behind it."""

from collections.abc import Iterable

import numpy as np

from benchmarks.family_categories import all_met, print_categories
from benchmarks.family_tasks import WORLDS, Task
from benchmarks.family_verdicts import print_verdicts

NEAR = 0.05  # of b
NEAR_OF_TAIL = 0.08  # of b
INACTIVE = 1e-6  # a multiplier below this is 0
Run = tuple[Task, dict]


def print_tables(records: list[dict]) -> None:
    """Print the aims beside what was measured, then each kind of run by world and round."""
    runs = [(Task.from_json(r["task"]), r) for r in records if "task" in r]
    print("| what | aim | measured | runs |\n|---|---|---|---|")
    for row in _aims(runs):
        print("| " + " | ".join(row) + " |")
    for kind in dict.fromkeys(task.kind for task, _ in runs if not task.categories):
        chosen = [run for run in runs if run[0].kind == kind]
        _print_rounds(kind, chosen)
        _print_fronts(chosen)
        _print_kappas(chosen)
    print_categories([run for run in runs if run[0].categories])
    _print_unseen([r for r in records if "unseen" in r])
    _print_peers([r for r in records if "peers" in r], runs)
    print_verdicts([r for r in records if "quickstart" in r])


def met(row: dict) -> bool:
    """Tell whether every |u| is within 5 % of b; an inactive constraint is met by u ≥ 0."""
    return all(
        abs(u) <= NEAR or (u >= 0 and row["lambda"][name] <= INACTIVE)
        for name, u in row["u_over_b"].items()
    )


def _share(flags: Iterable[bool]) -> str:
    flags = list(flags)
    return f"{sum(flags)} of {len(flags)}" if flags else "not run"


def _percent(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _median_worst(values: list[float]) -> str:
    if not values:
        return "not run"
    return f"{_percent(float(np.median(values)))} / {_percent(min(values))}"


def _closed_after(runs: list[Run], rounds: int) -> list[float]:
    return [r["rounds"][rounds - 1]["closed"] for _, r in runs if len(r["rounds"]) >= rounds]


def _last_closed(results: list[dict]) -> list[float]:
    return [result["rounds"][-1]["closed"] for result in results]


def _aims(runs: list[Run]) -> Iterable[tuple[str, str, str, str]]:
    """Rows of the issue's table that these records speak of."""
    as_set = [
        run
        for run in runs
        if run[0].setting == "conditional"
        and not (run[0].changes or run[0].kappa or run[0].categories or run[0].tail)
    ]
    usual = [run for run in as_set if run[0].lambda_0 is None]
    std1 = [run for run in usual if run[0].scale == "std 1" and not run[0].two]
    first = [run[1]["rounds"][0] for run in std1]
    what = "std 1: \\|u\\| ≤ 5 % of b after round 0"
    yield what, "≥ 90 % of runs", _share(met(row) for row in first), str(len(first))
    for rounds, aim in ((4, "≥ 92 / ≥ 80 %"), (7, "≥ 95 / ≥ 88 %")):
        closed = _closed_after(std1, rounds)
        what = f"std 1: gap closed after {rounds} rounds, median / worst"
        yield what, aim, _median_worst(closed), str(len(closed))
    two = [run for run in usual if run[0].two]
    later = [row for _, r in two for row in r["rounds"][1:4]]
    what = "two constraints: both \\|u\\| ≤ 5 % of b in each of rounds 1 to 3"
    yield what, "≥ 90 % of rounds", _share(map(met, later)), str(len(two))
    fronts = [[row["regret"] for row in r["front"]] for _, r in runs if "front" in r]
    worst = [max(front) for front in fronts]
    what = "front of eleven margins: largest regret, median world / worst world"
    measured = (
        f"{_percent(float(np.median(worst)), 1)} / {_percent(max(worst), 1)}" if worst else ""
    )
    yield what, "≤ 8 % in the median world", measured or "not run", str(len(worst))
    std10 = [r["rounds"][-1] for task, r in usual if task.scale == "std 10"]
    sizes = [max(map(abs, row["u_over_b"].values())) for row in std10]
    what = "std 10, β 0.1: \\|u\\|, median / worst"
    measured = f"{_percent(float(np.median(sizes)))} / {_percent(max(sizes))}" if sizes else ""
    yield what, "≤ 6 / ≤ 20 %", measured or "not run", str(len(sizes))
    tails = [r["rounds"][3] for task, r in runs if task.tail and len(r["rounds"]) > 3]
    sizes = [max(map(abs, row["u_over_b"].values())) for row in tails]
    closed = [row["closed"] for row in tails]
    what = "tail of 5 %, after 4 rounds: \\|u\\| ≤ 8 % of b; gap closed, median / worst"
    measured = f"{_share(size <= NEAR_OF_TAIL for size in sizes)}; {_median_worst(closed)}"
    yield what, "always; ≥ 90 %", measured, str(len(tails))
    eight = [r for task, r in runs if task.categories == "eight"]
    what = "eight categories, after the last round: every \\|u\\| ≤ 8 % of b; gap closed"
    measured = f"{_share(all_met(r) for r in eight)}; {_median_worst(_last_closed(eight))}"
    yield what, "≥ 90 % of runs; none given", measured, str(len(eight))
    wrong = [r for task, r in as_set if task.lambda_0 is not None]
    later = [row for r in wrong for row in r["rounds"][1:]]
    what = "λ_0 at 4 and 0.2 times λ\\*: \\|u\\| ≤ 5 % of b from round 1 on"
    yield what, "always", _share(map(met, later)), str(len(wrong))
    away = [abs(row["closed"] - own) for own, row in _kappa_rows(runs)]
    what = "κ from 0.5 to 1.5: Lagrangian's gap closed, farthest from κ = 1"
    yield what, "≤ 10 points", f"{100 * max(away):.0f} points" if away else "not run", ""


def _kappa_rows(runs: list[Run]) -> Iterable[tuple[float, dict]]:
    for _, result in runs:
        rows = result.get("kappas", [])
        for own in (row["closed"] for row in rows if row["kappa"] == 1):
            yield from ((own, row) for row in rows)


def _cell(row: dict) -> str:
    slacks = "/".join(f"{100 * value:+.1f}" for value in row["u_over_b"].values())
    return f"{slacks}, {100 * row['closed']:.0f}"


def _print_rounds(kind: Task, runs: list[Run]) -> None:
    rounds = range(max(len(r["rounds"]) for _, r in runs))
    print(f"\n**{kind.words()}**: u in % of b, gap closed in %, by round\n")
    heads = ["world", "seed", *(str(t) for t in rounds), "λ", "λ\\*", "KL", "trials", "samples"]
    print("| " + " | ".join([*heads, "seconds"]) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for task, result in sorted(runs, key=lambda run: (WORLDS.index(run[0].world), run[0].seed)):
        rows = result["rounds"]
        last = rows[-1]
        seconds = [sum(value or 0.0 for value in row["seconds"].values()) for row in rows]
        cells = [_cell(row) for row in rows]
        cells += [""] * (len(rounds) - len(cells))
        cells += ["/".join(f"{v:.3f}" for v in last["lambda"].values())]
        cells += ["/".join(f"{v:.3f}" for v in result["lambda_star"].values())]
        cells += [f"{last['kl']:.2f}", "+".join(str(row["trials"]) for row in rows)]
        cells += [f"{sum(row['sampled'] for row in rows):,}", f"{np.mean(seconds):.0f}"]
        print(f"| {task.world} | {task.seed} | " + " | ".join(cells) + " |")


def _print_fronts(runs: list[Run]) -> None:
    fronts = [(task, r["front"]) for task, r in runs if "front" in r]
    if not fronts:
        return
    print("\nRegret in % of the gap of the best policy without constraint, by margin\n")
    margins = [row["margin"] for row in fronts[0][1]]
    print("| world | seed | " + " | ".join(f"{m:.2f} b" for m in margins) + " |")
    print("|---" * (len(margins) + 2) + "|")
    for task, front in fronts:
        print(f"| {task.world} | {task.seed} | " + " | ".join(map(_regret, front)) + " |")


def _regret(row: dict) -> str:
    missed = abs(row["u_over_b"]) >= 0.005
    return f"{100 * row['regret']:.1f}" + f" ({100 * row['u_over_b']:+.0f})" * missed


def _print_kappas(runs: list[Run]) -> None:
    rows = [(task, r["kappas"]) for task, r in runs if "kappas" in r]
    if not rows:
        return
    print("\nLagrangian's gap closed in % (KL), by κ\n")
    kappas = [row["kappa"] for row in rows[0][1]]
    print("| world | seed | " + " | ".join(map(str, kappas)) + " |")
    print("|---" * (len(kappas) + 2) + "|")
    for task, closed in rows:
        cells = [f"{100 * row['closed']:.0f} ({row['kl']:.2f})" for row in closed]
        print(f"| {task.world} | {task.seed} | " + " | ".join(cells) + " |")


def _print_unseen(records: list[dict]) -> None:
    if not records:
        return
    rounds = range(max(len(r["rounds"]) for r in records))
    heads = ["world", "setting", "seed", *(str(t) for t in rounds), "λ", "λ\\*", "KL", "KL\\*"]
    print("\n**Unseen worlds**: u in % of b, gap closed in %, by round\n")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for r in records:
        last, cells = r["rounds"][-1], [_cell(row) for row in r["rounds"]]
        cells += [""] * (len(rounds) - len(cells))
        cells += [f"{v:.3f}" for v in (last["lambda"]["g1"], r["lambda_star"]["g1"])]
        cells += [f"{v:.2f}" for v in (last["kl"], r["kl_star"])]
        key = r["unseen"]
        print(
            f"| {key.get('world', 'pairs')} | {key['setting']} | {key['seed']} | "
            + " | ".join(cells)
            + " |"
        )


def _print_peers(records: list[dict], runs: list[Run]) -> None:
    """The peers' fronts beside those of the conditional runs of the same worlds and seeds."""
    if not records:
        return
    print("\n**Peers** at equal passes: regret in %, by margin (u in % of b where it is not 0)\n")
    by_name: list[tuple[str, str, list[dict]]] = []
    for record in records:
        world, seed = record["peers"]["world"], record["peers"]["seed"]
        ours = [
            r["front"]
            for task, r in runs
            if "front" in r and (task.world, task.seed) == (world, seed)
        ]
        by_name += [(world, "conditional", front) for front in ours[:1]]
        by_name += [(world, name, front) for name, front in record["fronts"].items()]
    margins = sorted({round(row["margin"], 6) for _, _, front in by_name for row in front})
    print("| world | way | " + " | ".join(f"{m:.2f} b" for m in margins) + " | mean | largest |")
    print("|---" * (len(margins) + 4) + "|")
    for world, name, front in by_name:
        at = {round(row["margin"], 6): row for row in front}
        cells = [_regret(at[m]) if m in at else "" for m in margins]
        regrets = [row["regret"] for row in front]
        cells += [f"{100 * value:.1f}" for value in (np.mean(regrets), max(regrets))]
        print(f"| {world} | {name} | " + " | ".join(cells) + " |")
