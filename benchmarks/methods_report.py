"""Tables and figures of bench_methods' records."""

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.shares import over_seeds
from constrained_dpo.recipe.methods import uses_margins
from constrained_dpo.report.comparison_figures import draw_achieved, draw_front
from constrained_dpo.report.drawing import LIGHT, render

IMPLICIT = {"pecan": "mocan", "pecaid": "caid"}
NAMES = {
    "mocan": "MoCAN (one-shot)",
    "caid": "CAID (multi-shot)",
    "pecan": "PeCAN (one-shot)",
    "pecaid": "PeCAID (multi-shot)",
    "ours": "ours (soft, pool grows)",
    "weighted_sum": "weighted sum",
    "dpo_helpful": "DPO on helpful",
    "dpo_harmless": "DPO on harmless",
}


def is_constrained(method: str) -> bool:
    return method in IMPLICIT or uses_margins(method)


def points(results: list[dict], split: str) -> pd.DataFrame:
    """The table that the figures of `cdpo compare` are drawn from: exact gains of the last round,
    mean and t-interval over seeds; in units of the std 1 world."""
    rows = []
    for method in NAMES:
        played = [r for r in results if r["task"][1] == method]
        for value in sorted({r["task"][2] for r in played}):
            alike = [r for r in played if r["task"][2] == value]
            row = {
                "method": NAMES[method],
                "setting": (value,),
                "fixed": not is_constrained(method),
                "runs": len(alike),
                "alone": method.removeprefix("dpo_") if method.startswith("dpo_") else None,
            }
            for name in ("helpful", "harmless", "kl"):
                values = [r["rounds"][-1][split][name] for r in alike]
                ends = over_seeds(values)
                row |= dict(
                    zip((f"gain_{name}", f"low_{name}", f"high_{name}"), ends, strict=True)
                ) | {f"exact_{name}": np.nan}
                row[f"best_{name}"] = (
                    np.mean([r["best"][split][name] for r in alike])
                    if uses_margins(method)
                    else np.nan
                )
            row["demanded_harmless"] = value if is_constrained(method) else np.nan
            row["closed"] = (
                np.mean([r["closed"][split] for r in alike]) if uses_margins(method) else np.nan
            )
            rows.append(row)
    return pd.DataFrame(rows)


def distances(results: list[dict], split: str) -> dict[str, dict[tuple[float, int], float]]:
    """|gain/b − 1| of every run that looks at margins, by method and (margin, seed)."""
    far: dict[str, dict[tuple[float, int], float]] = {}
    for result in results:
        _, method, value, seed = result["task"]
        if is_constrained(method):
            far.setdefault(method, {})[value, seed] = abs(
                result["rounds"][-1][split]["harmless"] / value - 1
            )
    return far


def report(results: list[dict], output: Path | None) -> None:
    for scale in dict.fromkeys(r["task"][0] for r in results):
        played = [r for r in results if r["task"][0] == scale]
        for split in ("dual", "test"):
            table = points(played, split)
            print(f"\n{scale}, {split} prompts: exact, mean [95 % interval over seeds]\n")
            print(
                "| method | b or λ | seeds | gain of harmless | change of helpful | KL | of the "
                "way to P* |\n" + "|---" * 7 + "|"
            )
            for _, r in table.iterrows():
                cells = [f"{r[f'gain_{n}']:+.3f}" for n in ("harmless", "helpful")]
                if r["runs"] > 1:
                    cells = [
                        f"{r[f'gain_{n}']:+.3f} [{r[f'low_{n}']:+.3f}, {r[f'high_{n}']:+.3f}]"
                        for n in ("harmless", "helpful")
                    ]
                demanded = "–" if pd.notna(r["alone"]) else f"{r['setting'][0]:g}"
                closed = "–" if np.isnan(r["closed"]) else f"{100 * r['closed']:.0f} %"
                print(
                    f"| {r['method']} | {demanded} | {r['runs']} | {' | '.join(cells)} | "
                    f"{r['gain_kl']:.2f} | {closed} |"
                )
            far = distances(played, split)
            print()
            for method, values in far.items():
                mean, most = 100 * np.mean(list(values.values())), 100 * max(values.values())
                line = (
                    f"{NAMES[method]}: |gain/b − 1| {mean:.1f} % in the mean, {most:.0f} % at most"
                )
                against = "pecan" if method == "pecaid" else "mocan"
                nearer: dict[
                    int, list[float]
                ] = {}  # by seed: the runs of one seed share its pool and are not independent
                for key in values.keys() & far.get(against, {}).keys():
                    nearer.setdefault(key[1], []).append(far[against][key] - values[key])
                if method not in ("mocan", "pecan") and len(nearer) > 1:
                    mean, low, high = (
                        100 * v for v in over_seeds([np.mean(v) for v in nearer.values()])
                    )
                    wins = sum(v > 0 for differences in nearer.values() for v in differences)
                    line += (
                        f"; nearer than {NAMES[against]} by {mean:+.1f} % of b [{low:+.1f}, "
                        f"{high:+.1f}] over {len(nearer)} seeds, "
                    )
                    line += f"in {wins} of {sum(map(len, nearer.values()))} pairs of runs"
                print(line)
            if output:
                draw(table, output, f"methods_{scale.replace(' ', '')}_{split}")


def draw(table: pd.DataFrame, output: Path, stem: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    colours = {method: index for index, method in enumerate(NAMES.values())}
    demanding = table[~table["fixed"]]
    if len(demanding):
        figure = render(lambda style: draw_achieved(style, demanding, "harmless", colours), LIGHT)
        (output / f"{stem}_achieved.png").write_bytes(figure)
    (output / f"{stem}_front.png").write_bytes(
        render(lambda style: draw_front(style, table, ("harmless", "helpful"), colours), LIGHT)
    )
