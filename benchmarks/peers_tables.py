"""The tables of bench_peers: one a world and seed, and what all runs of a scale have in common."""

import math
from dataclasses import dataclass
from statistics import median

from benchmarks.family_tables import NEAR
from benchmarks.family_tasks import WORLDS
from benchmarks.peers_preferences import PeerTask

WEIGHTED = "weighted sum"


@dataclass(frozen=True)
class PeerRun:
    """A row's figures on one world and seed; record: as bench_peers writes it."""

    peer: str
    world: str
    seed: int
    record: dict


def print_tables(records: list[dict]) -> None:
    """Print for each scale and number of steps what a peer's runs come to, then world by world."""
    groups: dict[tuple[str, int], list[PeerRun]] = {}
    keys = [tuple(r["task"][k] for k in ("scale", "steps", "world", "seed")) for r in records]
    for key in sorted(set(keys), key=lambda key: (key[:2], WORLDS.index(key[2]), key[3])):
        chosen = [r for r, other in zip(records, keys, strict=True) if other == key]
        for name, record in _summed(chosen):
            groups.setdefault(key[:2], []).append(PeerRun(name, *key[2:], record))
    for (scale, steps), runs in groups.items():
        print(f"\n**{scale}, {steps} steps**: medians, and the worst run\n")
        _print_summary(runs)
        print(f"\n**{scale}, by world**: gap closed with u at λ\\*'s price (u in % of b)\n")
        _print_worlds(runs)


def _print_summary(runs: list[PeerRun]) -> None:
    heads = ["peer", "runs", "gap closed", "with u at λ\\*'s price", "\\|u\\|, % of b"]
    heads += ["\\|u\\| ≤ 5 %", "below −5 %", "first step from which \\|u\\| ≤ 5 %"]
    heads += ["passes", "samples", "CPU s"]
    _print_row(heads)
    _print_row(["---"] * len(heads))
    for name in dict.fromkeys(run.peer for run in runs):
        _print_row([name, *_summary([run.record for run in runs if run.peer == name])])


def _summary(records: list[dict]) -> list[str]:
    last = [record["rows"][-1] for record in records]
    away = [abs(row["u_over_b"]) for row in last]
    first = median(settled(record["rows"]) or math.inf for record in records)
    price = [priced(record, row) for record, row in zip(records, last, strict=True)]
    return [
        str(len(records)),
        _shares([row["closed"] for row in last]),
        _shares(price),
        f"{100 * median(away):.0f}, {100 * max(away):.0f}",
        str(sum(value <= NEAR for value in away)),
        str(sum(row["u_over_b"] < -NEAR for row in last)),
        "never" if math.isinf(first) else f"{first:.0f}",
        *(
            f"{median(record[key] for record in records):,.0f}"
            for key in ("sequences", "sampled", "seconds")
        ),
    ]


def _shares(values: list[float]) -> str:
    return f"{100 * median(values):.0f}, {100 * min(values):.0f} %".replace("-", "−")


def _print_worlds(runs: list[PeerRun]) -> None:
    worlds = [world for world in WORLDS if any(run.world == world for run in runs)]
    _print_row(["peer", *worlds])
    _print_row(["---"] * (len(worlds) + 1))
    for name in dict.fromkeys(run.peer for run in runs):
        cells = {world: [] for world in worlds}
        for run in runs:
            if run.peer == name:
                cells[run.world].append(_cell(run.record))
        _print_row([name, *(", ".join(cell) for cell in cells.values())])


def _cell(record: dict) -> str:
    row = record["rows"][-1]
    slack = f"{100 * row['u_over_b']:+.0f}"
    slack = slack if row["u_over_b"] >= -NEAR else f"**{slack}**"
    return f"{100 * priced(record, row):.0f} % ({slack})".replace("-", "−")


def _print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def _summed(records: list[dict]) -> list[tuple[str, dict]]:
    """The peers' records by name, in the order of the records; those of the weighted sums become
    two: the best in hindsight after all their passes, and after a quarter of them."""
    tasks = [PeerTask(**record["task"]) for record in records]
    rows, weighted = [], []
    for task, record in zip(tasks, records, strict=True):
        if task.peer.startswith(WEIGHTED):
            weighted.append(record)
        else:
            rows.append((task.words(), record))
    if weighted:
        count = len(weighted)
        shorter = [r | {"rows": r["rows"][:1]} for r in weighted]
        quarter = {key: sum(r[key] for r in weighted) / 4 for key in ("sequences", "seconds")}
        for words, group in ((f"{count} weights", weighted), (f"{count} weights, ¼ each", shorter)):
            total = {k: sum(r[k] for r in group) for k in ("sequences", "sampled", "seconds")}
            if group is shorter:
                total |= quarter | {"sampled": sum(_first_quarter(r) for r in weighted)}
            rows.append((f"{WEIGHTED}, best of {words}", best_in_hindsight(group) | total))
    return rows


def _first_quarter(record: dict) -> int:
    """Samples until the first look: those of π_ref and a quarter of the policy's."""
    drawn = record["reference_draws"]
    return drawn + (record["sampled"] - drawn) // 4


def best_in_hindsight(records: list[dict]) -> dict:
    """The record that a judge who knows the exact values would choose: of those within 5 % of b
    below the margin, or above it, the one that closes most; where there is none, the one that
    comes nearest to the margin."""
    last = lambda record: record["rows"][-1]
    feasible = [r for r in records if last(r)["u_over_b"] >= -NEAR]
    if feasible:
        return max(feasible, key=lambda r: last(r)["closed"])
    return max(records, key=lambda r: last(r)["u_over_b"])


def settled(rows: list[dict]) -> int | None:
    """The first step from which on |u| stays within 5 % of b at every look; None: at no look."""
    away = [k for k, row in enumerate(rows) if abs(row["u_over_b"]) > NEAR]
    first = max(away, default=-1) + 1
    return rows[first]["steps"] if first < len(rows) else None


def priced(record: dict, row: dict) -> float:
    """Share closed of the Lagrangian's gap at λ*, from π_ref's to P*: L = objective + λ*·u.

    The objective alone flatters a policy that violates the constraint.
    """
    price = record["lambda_star"] * record["margin"]
    whole = record["gap"] + price  # u of π_ref is −b
    return 1 - (record["gap"] * (1 - row["closed"]) - price * row["u_over_b"]) / whole
