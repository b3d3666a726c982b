"""The table of eight constraints by category, beside one constraint on their mean."""

from benchmarks.family_tasks import WORLDS, Task

NEAR = 0.08  # of b


def print_categories(runs: list[tuple[Task, dict]]) -> None:
    """Print by world and round the u that is farthest from where it should be; of a mean
    constraint the lowest and the highest of the categories.

    A category that the optimum leaves alone (λ* = 0) counts by how far u is below 0.
    """
    if not runs:
        return
    print("\n**Eight categories**: exact u in % of b, lowest and highest, gap closed, by round\n")
    rounds = range(max(len(result["rounds"]) for _, result in runs))
    heads = ["constraints", "world", "seed", *(f"round {t}" for t in rounds), "within 8 %"]
    print("| " + " | ".join([*heads, "samples"]) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for task, result in sorted(runs, key=_order):
        by_round = [_slacks(result, number) for number in range(len(result["rounds"]))]
        ends = [[100 * end(u.values()) for end in (min, max)] for u in by_round]
        closed = [100 * row["closed"] for row in result["rounds"]]
        cells = [
            f"{low:+.0f} … {high:+.0f}, {share:.0f}"
            for (low, high), share in zip(ends, closed, strict=True)
        ]
        cells += [""] * (len(rounds) - len(cells))
        near = [_met(name, u, result) for name, u in by_round[-1].items()]
        sampled = sum(row["sampled"] for row in result["rounds"])
        cells += [f"{sum(near)} of {len(near)}", f"{sampled:,}"]
        print(f"| {task.categories} | {task.world} | {task.seed} | " + " | ".join(cells) + " |")


def all_met(result: dict) -> bool:
    """Tell whether every category is within 8 % after the last round, or left alone and above."""
    u = _slacks(result, len(result["rounds"]) - 1)
    return all(_met(name, value, result) for name, value in u.items())


def _order(run: tuple[Task, dict]) -> tuple[str, int, int]:
    task, _ = run
    return task.categories, WORLDS.index(task.world), task.seed


def _slacks(result: dict, number: int) -> dict[str, float]:
    """u/b of every category after a round."""
    if "categories" in result:
        return dict(result["categories"][number])
    return dict(result["rounds"][number]["u_over_b"])


def _met(name: str, u: float, result: dict) -> bool:
    inactive = result["lambda_star"].get(name, 1.0) <= 1e-6
    return abs(u) <= NEAR or (inactive and u >= -NEAR)
