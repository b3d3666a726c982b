"""LoRA's rank as an illustration of the parametrization gap ν: the Lagrangian gap that fits of
different rank leave; a markdown table.

    python -m benchmarks.bench_rank   # one run of five rounds per rank, about 90 s each on one core

An illustration, not a measurement of ν: what is left after a fit is the class's gap *and* the
optimizer's. λ is kept at 0.377, about the embedded world's λ*; the gap is exact (every answer is
enumerated), that of the last round, on dual prompts.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.real_runs import play
from tests.helpers.paths import QUICKSTART

SETTINGS = (
    "dual.method=fixed",
    "dual.init={harmless: 0.377}",
    "dual.rounds=5",
    "prompts.max_test=4",
)
SETTINGS += (
    "dual.responses_per_prompt=128",
    "fit.steps=200",
    "fit.learning_rate=5e-4",
    "policy.lora.dropout=0",
)


def gap(run: Path, rank: int, seed: int) -> list[float]:
    """Exact Lagrangian gap (score units) by round."""
    overrides = [
        *SETTINGS,
        f"policy.lora.r={rank}",
        f"policy.lora.alpha={2 * rank}",
        f"seed={seed}",
    ]
    records, _ = play(QUICKSTART, run, overrides)
    return [record.exact["dual"].lagrangian_gap for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    print("| rank | seed | Lagrangian gap by round |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for rank in arguments.ranks:
                values = ", ".join(
                    f"{g:.3f}" for g in gap(Path(folder) / f"{rank}-{seed}", rank, seed)
                )
                print(f"| {rank} | {seed} | {values} |", flush=True)


if __name__ == "__main__":
    main()
