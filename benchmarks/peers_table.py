"""Tables of bench_peers."""

from benchmarks.family_tables import NEAR

WEIGHTED = "weighted sum"


def print_tables(records: list[dict]) -> None:
    """Print one table for each world, scale, seed and number of steps."""
    keys = [tuple(r["task"][k] for k in ("scale", "world", "seed", "steps")) for r in records]
    for key in dict.fromkeys(keys):
        chosen = [r for r, other in zip(records, keys, strict=True) if other == key]
        scale, world, seed, steps = key
        best = chosen[0]["lambda_star"]
        print(f"\n**{world}, {scale}, seed {seed}, {steps} steps**, λ\\* {best:.3f}\n")
        heads = ["peer", "gap closed", "with u at λ\\*'s price", "u in % of b", "KL", "λ"]
        heads += ["\\|u\\| ≤ 5 % of b from step", "passes", "samples", "CPU s"]
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for name, record in _summed(chosen):
            print(f"| {name} | " + " | ".join(_cells(record)) + " |")


def _summed(records: list[dict]) -> list[tuple[str, dict]]:
    """The peers' records by name, in the order of the records; those of the weighted sums become
    two: the best in hindsight after all their passes, and after a quarter of them."""
    rows = [(r["task"]["peer"], r) for r in records if not r["task"]["peer"].startswith(WEIGHTED)]
    weighted = [r for r in records if r["task"]["peer"].startswith(WEIGHTED)]
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


def _cells(record: dict) -> list[str]:
    last, first = record["rows"][-1], settled(record["rows"])
    slack = f"{100 * last['u_over_b']:+.1f}"
    return [
        f"{100 * last['closed']:.0f} %",
        f"{100 * priced(record, last):.0f} %",
        slack if last["u_over_b"] >= -NEAR else f"**{slack}**",
        f"{last['kl']:.2f}",
        _value(last["lambda"]) if last["lambda"] else "",
        str(first or "never"),
        *(f"{record[key]:,.0f}" for key in ("sequences", "sampled", "seconds")),
    ]


def _value(lambda_: dict[str, float]) -> str:
    return "/".join(f"{value:.3f}" for value in lambda_.values())
