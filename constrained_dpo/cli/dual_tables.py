"""What `cdpo dual` prints: solutions, sweeps, and their JSON."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from constrained_dpo.cli.options import results_console

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from constrained_dpo.dual.feasibility import Feasibility
    from constrained_dpo.dual.one_shot import FirstMultipliers
    from constrained_dpo.dual.sensitivity import SweepPoint
    from constrained_dpo.problem import ConstrainedProblem


def solution_values(first: "FirstMultipliers") -> dict[str, object]:
    """Give what `--json` says of a solution."""
    solution = first.plain
    return {
        "lambda": first.lambda_.to_dict(),
        "lambda_sampled": solution.lambda_.to_dict(),
        "dual_value": solution.dual_value,
        "ess": solution.ess,
        "min_ess": solution.min_ess,
        "reward": solution.reward,
        "utilities": solution.utilities.to_dict(),
        "kl": solution.kl,
        "at_bound": list(solution.at_bound),
    }


def feasibility_values(feasibility: "Feasibility | None") -> dict[str, object] | None:
    """Give what `--json` says of the feasibility, where it was asked about."""
    if feasibility is None:
        return None
    numbers = {
        "slack": feasibility.slack,
        "se": feasibility.se,
        "num_prompts": feasibility.num_prompts,
    }
    return {
        "verdict": feasibility.verdict,
        "constraints": list(feasibility.constraints),
        "together": feasibility.together,
        "largest": feasibility.largest.to_dict(),
        "shortfall": feasibility.shortfall.to_dict(),
        **finite(numbers),
        "sentence": feasibility.sentence(),
    }


def finite(row: Mapping[Any, Any]) -> dict[str, object]:
    """JSON has no nan and no infinity: null instead."""
    return {
        str(k): None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }


def print_solution(
    first: "FirstMultipliers",
    problem: "ConstrainedProblem",
    interval: "pd.DataFrame | None",
    parts: "pd.DataFrame | None",
) -> None:
    """Print λ*, D(λ*), the predicted means, and λ* on parts of the table."""
    solution = first.plain
    for name in problem.names:
        error = ""
        if interval is not None:
            error = f" [{interval['low'][name]:.4g}, {interval['high'][name]:.4g}]"
        print(
            f"λ*({name}) = {first.lambda_[name]:.6g}{error}, {solution.lambda_[name]:.6g} before "
            f"the correction for {first.responses} responses per prompt; predicted E[{name}] = "
            f"{solution.utilities[name]:.6g}"
        )
    print(
        f"D(λ*) = {solution.dual_value:.6g}; predicted E[{problem.reward}] = "
        f"{solution.reward:.6g}, KL {solution.kl:.4g} nats; "
        f"ESS per prompt: mean {solution.ess:.1f}, min {solution.min_ess:.1f}"
    )
    if parts is not None:
        for name in problem.names:
            results_console().print(_stability_table(name, parts[parts["constraint"] == name]))


def _stability_table(name: str, parts: "pd.DataFrame") -> "Table":
    from rich.table import Table

    title = f"λ*({name}) on random parts of the table, mean ± sd"
    table = Table("prompts", title=title, title_justify="left")
    rows: dict[int, dict[int, str]] = {}
    for row in parts.to_dict("records"):
        spread = f" ± {row['sd']:.2g}" if row["repeats"] > 1 else ""
        cells = rows.setdefault(row["num_prompts"], {})
        cells[row["num_responses"]] = f"{row['mean']:.4g}{spread}"
    sizes = sorted({size for cells in rows.values() for size in cells})
    for size in sizes:
        table.add_column(f"{size} responses", justify="right")
    for count, cells in sorted(rows.items()):
        table.add_row(str(count), *(cells[size] for size in sizes))
    return table


def print_sweep(points: list["SweepPoint"], problem: "ConstrainedProblem") -> None:
    """Print λ* and the predicted means of every setting."""
    from rich.table import Table

    names, table = problem.names, Table()
    head = [
        f"{'margin' if c.threshold is None else 'threshold'} {c.name}" for c in problem.constraints
    ]
    head += [f"λ*({n})" for n in names]
    for column in (*head, *(f"E[{n}]" for n in problem.objectives), "KL", "ESS"):
        table.add_column(column, justify="right")
    for point in points:
        solution, lambda_ = point.first.plain, point.first.lambda_
        multipliers = (f"{lambda_[n]:.5g}{'!' if n in solution.at_bound else ''}" for n in names)
        levels = (f"{point.bounds[n]:.4g}" for n in names)
        means = (solution.reward, *solution.utilities, solution.kl)
        numbers = (f"{value:.4g}" for value in means)
        table.add_row(*levels, *multipliers, *numbers, f"{solution.ess:.1f}")
    results_console().print(table)
