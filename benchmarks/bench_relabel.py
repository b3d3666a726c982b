"""`make bench-relabel`: 4 million scored responses under a new λ, from file to file; a markdown
table on stdout.

Every measurement is a process of its own with one numpy thread; seconds are those of the whole
process, its start included, the peak is its largest resident memory. Beside ours, what a user of
TRL would write with `datasets.map`, one process, from the same parquet file to a parquet file with
the same columns; number of pairs and mean prob and margin are checked against ours:

- by prompt: batches of one prompt's responses, a Python loop over its pairs. This form needs what
  ours does not, that every prompt's rows lie together and are equally many.
- by 1000 prompts: the same in numpy over batches of 1000 prompts.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import numpy as np

LAMBDA = 0.7
SHAPES = {
    "500,000 × 8, all 28 pairs": (500_000, 8, None),
    "31,250 × 128, 128 pairs": (31_250, 128, 128),
}
METHODS = {
    "cdpo": "`cdpo data relabel`",
    "scattered": "the same, rows in random order",
    "groups": "`cdpo data relabel --group-size 8 --groups-per-prompt 1`",
    "label_pairs": "`label_pairs` in memory, no file written",
    "label_groups": "`label_groups` in memory, as above",
    "map by prompt": "`datasets.map`, by prompt",
    "map by 1000 prompts": "`datasets.map`, numpy, by 1000 prompts",
}


def make_table(folder: Path, prompts: int, responses: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows = prompts * responses
    reward = rng.normal(size=rows)
    table = {
        "prompt_id": pa.array([f"prompt-{i:06d}" for i in range(prompts)]).take(
            pa.array(np.repeat(np.arange(prompts), responses))
        ),
        "response_id": pa.array(
            [f"prompt-{i:06d}/{k}" for i in range(prompts) for k in range(responses)]
        ),
        "r": reward,
        "g": -0.6 * reward + 0.8 * rng.normal(size=rows),
    }
    pq.write_table(pa.table(table), folder / "scores.parquet", compression="zstd")
    pq.write_table(
        pa.table(table).take(pa.array(rng.permutation(rows))),
        folder / "scattered.parquet",
        compression="zstd",
    )


def map_by_prompt(responses: int, pairs: int | None):
    every, rng = list(combinations(range(responses), 2)), random.Random(0)

    def to_pairs(batch: dict[str, list]) -> dict[str, list]:
        score = [r + LAMBDA * g for r, g in zip(batch["r"], batch["g"], strict=True)]
        ids, rows = (
            batch["response_id"],
            {
                "prompt_id": [],
                "chosen_id": [],
                "rejected_id": [],
                "prob": [],
                "target": [],
                "margin": [],
            },
        )
        for i, j in every if pairs is None else rng.sample(every, pairs):
            if score[i] < score[j]:
                i, j = j, i
            margin = score[i] - score[j]
            prob = 1 / (1 + math.exp(-margin))
            for column, value in zip(
                rows.values(),
                (batch["prompt_id"][0], ids[i], ids[j], prob, prob, margin),
                strict=True,
            ):
                column.append(value)
        return rows

    return to_pairs, responses


def map_by_many(responses: int, pairs: int | None):
    left, right = np.triu_indices(responses, 1)
    rng = np.random.default_rng(0)

    def to_pairs(batch: dict[str, list]) -> dict[str, np.ndarray]:
        score = (np.array(batch["r"]) + LAMBDA * np.array(batch["g"])).reshape(-1, responses)
        prompts = len(score)
        if pairs is None:
            i, j = np.tile(left, (prompts, 1)), np.tile(right, (prompts, 1))
        else:
            drawn = np.stack([rng.choice(len(left), pairs, replace=False) for _ in range(prompts)])
            i, j = left[drawn], right[drawn]
        at = np.arange(prompts)[:, None]
        wins = score[at, i] >= score[at, j]
        chosen, rejected = np.where(wins, i, j), np.where(wins, j, i)
        margin = score[at, chosen] - score[at, rejected]
        prob = 1 / (1 + np.exp(-margin))
        ids = np.array(batch["response_id"]).reshape(-1, responses)
        names = np.repeat(np.array(batch["prompt_id"])[::responses], i.shape[1])
        flat = [a.ravel() for a in (ids[at, chosen], ids[at, rejected], prob, prob, margin)]
        return dict(
            zip(
                ("prompt_id", "chosen_id", "rejected_id", "prob", "target", "margin"),
                (names, *flat),
                strict=True,
            )
        )

    return to_pairs, 1000 * responses


def measure(method: str, folder: Path, responses: int, pairs: int | None) -> None:
    """One measurement, in this process; writes pairs.parquet unless it is one in memory."""
    source, output = folder / "scores.parquet", folder / "pairs.parquet"
    if method.startswith("map"):
        import datasets

        datasets.disable_progress_bars()
        function, size = (map_by_prompt if method == "map by prompt" else map_by_many)(
            responses, pairs
        )
        table = datasets.load_dataset(
            "parquet", data_files=str(source), split="train", cache_dir=str(folder / "cache")
        )
        table.map(
            function, batched=True, batch_size=size, remove_columns=table.column_names
        ).to_parquet(output)
    elif method in ("label_pairs", "label_groups"):
        import pandas as pd

        from data_prep.labels.groups import label_groups
        from data_prep.labels.preferences import label_pairs

        table, lambda_ = pd.read_parquet(source), pd.Series({"g": LAMBDA})
        start = time.perf_counter(), time.process_time()
        if method == "label_pairs":
            label_pairs(table, "r", lambda_, labels="soft", pairs_per_prompt=pairs, seed=0)
        else:
            label_groups(table, "r", lambda_, group_size=8, groups_per_prompt=1, seed=0)
        print(
            json.dumps(
                {"seconds": time.perf_counter() - start[0], "cpu": time.process_time() - start[1]}
            )
        )
    else:
        from constrained_dpo.cli.main import app

        how = (
            ["--group-size", "8", "--groups-per-prompt", "1"]
            if method == "groups"
            else ["--pairs-per-prompt", str(pairs or "all")]
        )
        source = folder / "scattered.parquet" if method == "scattered" else source
        arguments = [
            "data",
            "relabel",
            source,
            "--reward",
            "r",
            "--lambda",
            f"g={LAMBDA}",
            *how,
            "-o",
            output,
        ]
        app([str(a) for a in arguments], standalone_mode=False)


def child(method: str, folder: Path, responses: int, pairs: int | None) -> dict[str, float]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--one",
        method,
        str(folder),
        str(responses),
        str(pairs or 0),
    ]
    lines = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    ).stdout.splitlines()
    measured = {"seconds": time.perf_counter() - start} | json.loads(lines[-1])
    if method.startswith("label"):
        measured |= json.loads(lines[-2])  # the call alone
    if method in ("cdpo", "scattered") or method.startswith("map"):
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.read_table(folder / "pairs.parquet", columns=["prob", "margin"])
        measured |= {
            "rows": len(table),
            "prob": pc.mean(table["prob"]).as_py(),
            "margin": pc.mean(table["margin"]).as_py(),
        }
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shrink", type=int, default=1, help="so many times fewer prompts, for a try"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of ours; datasets.map runs once")
    parser.add_argument(
        "--one", nargs=4, metavar=("METHOD", "FOLDER", "RESPONSES", "PAIRS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.one:
        method, folder, responses, pairs = arguments.one
        measure(method, Path(folder), int(responses), int(pairs) or None)
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        print(
            json.dumps({"cpu": time.process_time(), "peak": int(status["VmHWM"].split()[0]) / 1024})
        )
        return
    for label, (prompts, responses, pairs) in SHAPES.items():
        prompts //= arguments.shrink
        print(
            f"\n**{label}**\n\n| what | seconds | CPU seconds | times ours, wall / CPU | peak, MB "
            "|\n|---|---|---|---|---|",
            flush=True,
        )
        ours: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_table(folder, prompts, responses)
            for method, words in METHODS.items():
                repeats = 1 if method.startswith("map") else arguments.repeats
                runs = sorted(
                    (child(method, folder, responses, pairs) for _ in range(repeats)),
                    key=lambda r: r["cpu"],
                )
                median = runs[len(runs) // 2]
                ours = ours or median
                if "rows" in median:
                    assert (
                        median["rows"]
                        == ours["rows"]
                        == prompts * (pairs or responses * (responses - 1) // 2)
                    )
                    # drawn pairs are other pairs, and fewer of them differ more
                    tolerance = 1e-9 if pairs is None else 0.01 * math.sqrt(arguments.shrink)
                    for column in ("prob", "margin"):
                        assert abs(median[column] - ours[column]) < tolerance
                ratio = (
                    f"{median['seconds'] / ours['seconds']:.1f} / {median['cpu'] / ours['cpu']:.1f}"
                )
                print(
                    f"| {words} | {median['seconds']:.1f} | {median['cpu']:.1f} | {ratio} | "
                    f"{median['peak']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
