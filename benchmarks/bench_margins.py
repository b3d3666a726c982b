"""One-shot against multi-shot with real LoRA fits on the embedded world, over a range of
margins: how far each lands from b, exactly.

    python -m benchmarks.bench_margins --output docs/figures   # 2 runs of 90 s a margin and seed

Both play the same number of rounds with the same passes; one-shot keeps λ at its λ*, multi-shot
moves it. Fits are shorter than the recipe's, samples fewer, dual steps twice as large. The
figures are exact values of the last round (round.json: every answer of the world is
enumerated).
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.real_runs import play
from benchmarks.shares import over_seeds, share_closed
from tests.helpers.paths import QUICKSTART

SETTINGS = (
    *(
        "sampling.responses_per_prompt=32",
        "dual.responses_per_prompt=64",
        "fit.steps=100",
        "fit.learning_rate=3e-4",
    ),
    *("dual.rounds=8", "dual.step_size=0.6"),
)
METHODS = {"one-shot": "one_shot", "multi-shot": "subgradient"}


def one_run(run: Path, method: str, margin: float, seed: int) -> dict:
    """Plays a run; the last round's λ, exact utility gain over π_ref (score units, dual prompts),
    share of the gap closed, KL (nats)."""
    overrides = [
        *SETTINGS,
        f"dual.method={METHODS[method]}",
        f"objective.constraints.harmless.margin={margin}",
        f"seed={seed}",
    ]
    records, optima = play(QUICKSTART, run, overrides)
    last, optimum = records[-1], optima["dual"]
    exact = last.exact["dual"]
    return {
        "b": margin,
        "seed": seed,
        "method": method,
        "λ": last.lambda_["harmless"],
        "λ*": optimum.lambda_["harmless"],
        "gain": exact.u["harmless"] + margin,
        "closed": share_closed(optimum, exact),
        "kl": exact.kl,
    }


def summarize(table: pd.DataFrame) -> None:
    """Means over seeds with their 95 % t-intervals, and in how many seeds each method lands nearer
    to b than the other."""
    print(
        "\n| b | method | seeds | λ | gain/b − 1 [95 %] | gap to P* closed | nearer to b |\n"
        + "|---" * 7
        + "|"
    )
    table = table.assign(off=table["gain"] / table["b"] - 1)
    for margin, group in table.groupby("b"):
        off = group.pivot(index="seed", columns="method", values="off").abs()
        for method in METHODS:
            runs = group[group["method"] == method]
            mean, low, high = over_seeds(runs["off"].tolist())
            cells = [f"{margin:g}", method, str(len(runs)), f"{runs['λ'].mean():.2f}"]
            cells += [
                f"{100 * mean:+.0f} % [{100 * low:+.0f}, {100 * high:+.0f}]",
                f"{100 * runs['closed'].mean():.0f} %",
            ]
            cells.append(
                f"{int((off[method] < off.drop(columns=method).iloc[:, 0]).sum())} of {len(off)}"
            )
            print("| " + " | ".join(cells) + " |")


def draw(table: pd.DataFrame, path: Path) -> None:
    """Gain over π_ref against the margin, by method, one dot per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    axes.plot(
        [0, table["b"].max() * 1.1],
        [0, table["b"].max() * 1.1],
        color="0.6",
        lw=1,
        label="exactly b",
    )
    for (method, group), colour, marker in zip(
        table.groupby("method"), ("C0", "C1"), "os", strict=True
    ):
        axes.plot(group["b"], group["gain"], marker, color=colour, label=method, ms=5)
    axes.set(
        xlabel="margin b",
        ylabel="utility gain over π_ref, exact",
        title="LoRA fits, embedded world",
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--margins", type=float, nargs="+", default=[0.2, 0.5, 0.8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="folder for one_shot_lora.png")
    arguments = parser.parse_args()
    print(
        "| b | seed | method | λ | λ* | gain, exact | gain/b − 1 | gap to P* closed | KL |\n|"
        + "---|" * 9,
        flush=True,
    )
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for margin in arguments.margins:
                for method in METHODS:
                    r = one_run(Path(folder) / f"{method}-{margin}-{seed}", method, margin, seed)
                    results.append(r)
                    cells = [
                        f"{margin:g}",
                        str(seed),
                        method,
                        f"{r['λ']:.3f}",
                        f"{r['λ*']:.3f}",
                        f"{r['gain']:.3f}",
                    ]
                    cells += [
                        f"{100 * (r['gain'] / margin - 1):+.0f} %",
                        f"{100 * r['closed']:.0f} %",
                        f"{r['kl']:.2f}",
                    ]
                    print("| " + " | ".join(cells) + " |", flush=True)
    summarize(pd.DataFrame(results))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        draw(pd.DataFrame(results), arguments.output / "one_shot_lora.png")


if __name__ == "__main__":
    main()
