"""`make bench-prepare`: 30,000 prompts to fit on with two responses each, read, split, tokenized
and validated; a markdown table on stdout.

The rows are synthetic in the columns of PKU-SafeRLHF-30K: words drawn by Zipf's law from 20,000
pseudo-words, prompts of about 16 words, responses of about 80 (log-normal), 2 % test prompts, 3 %
of the prompts in two rows. The tokenizer is a byte-level BPE of 32,000 tokens trained on 20,000 of
the responses, unless --tokenizer names a folder. Every measurement is a process of its own; seconds
are of the process without its imports (`wall`, and `CPU` of all its threads), the peak is its
largest resident memory, and beside it that after the imports.

- `ours`: what `cdpo prepare` does before a model is called: prompts read and split,
  tokenized, the responses read, tokenized behind their prompts with EOS, written as a validated
  responses table.
- `one by one`: the same rows by `datasets.load_dataset(...).to_list()`, prompts and responses
  tokenized by one call each, as lists.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

PROMPTS, TEST, REPEATED = 30_600, 0.02, 0.03
TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"


def make_rows(folder: Path, prompts: int) -> None:
    """pku.jsonl and pku.parquet with the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    syllables = np.array(
        [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "er", "in", "on")]
    )
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)])
    odds = 1 / np.arange(1, len(words) + 1)
    drawn = iter(words[rng.choice(len(words), 200 * prompts, p=odds / odds.sum())])

    def text(mean: float, end: str) -> str:
        count = int(np.clip(rng.lognormal(np.log(mean), 0.6), 3, 400))
        return " ".join(next(drawn) for _ in range(count)).capitalize() + end

    texts = [text(14, "?") for _ in range(prompts)]
    rows = [
        {
            "prompt": prompt,
            "response_0": text(65, "."),
            "response_1": text(65, "."),
            "is_response_0_safe": bool(rng.random() < 0.5),
            "is_response_1_safe": bool(rng.random() < 0.5),
            "better_response_id": int(rng.integers(2)),
            "safer_response_id": int(rng.integers(2)),
        }
        for prompt in [*texts, *texts[: int(REPEATED * prompts)]]
    ]
    (folder / "pku.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "pku.parquet")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE with <s> in front and </s>, trained on some of the responses."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    with open(folder / "pku.jsonl") as handle:
        lines = [json.loads(line) for line in islice(handle, 20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator((row["response_0"] for row in lines), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "tokenizer")


def ours(source: Path, tokenizer: object, folder: Path) -> dict[str, object]:
    from data_prep.prompts.preference_rows import answer_table, read_answers
    from data_prep.prompts.settings import PromptSettings
    from data_prep.prompts.split import split_prompts
    from data_prep.prompts.templates import tokenize_prompts
    from data_prep.readers.tables import write_parquet
    from data_prep.tables import validate_responses

    seconds, last = {}, time.perf_counter()

    def done(phase: str) -> None:
        nonlocal last
        seconds[phase], last = time.perf_counter() - last, time.perf_counter()

    settings = PromptSettings(source=str(source), template=TEMPLATE, test=TEST)
    prompts, left_out = split_prompts(settings, 600)
    done("prompts read and split")
    tokens = tokenize_prompts(prompts, settings, tokenizer)
    done("prompts tokenized")
    fit = prompts[prompts["split"] != "test"]
    answers = read_answers(settings, fit["prompt_id"], label="better_response_id")
    done("responses read")
    texts = fit.set_index("prompt_id")["prompt"]
    table = answer_table(
        answers, texts, tokens, settings, tokenizer, (tokenizer.eos_token_id,), 512
    )
    done("responses tokenized")
    write_parquet(validate_responses(table, [], "bench"), folder / "dataset.parquet")
    done("validated and written")
    counts = {
        "prompts": len(prompts),
        "responses": len(table),
        "pairs": len(answers.pairs),
        "left_out": {**left_out, **answers.left_out},
    }
    return {"seconds": seconds, "tokens": int(table["token_ids"].map(len).sum()), **counts}


def one_by_one(source: Path, tokenizer: object, folder: Path) -> dict[str, object]:
    import datasets

    kind = "parquet" if source.suffix == ".parquet" else "json"
    rows = datasets.load_dataset(
        kind, data_files=str(source), split="train", cache_dir=str(folder / "cache")
    ).to_list()
    prompts = {
        row["prompt"]: tokenizer(TEMPLATE.replace("{prompt}", row["prompt"]))["input_ids"]
        for row in rows
    }
    ids = [
        [*tokenizer(r[c], add_special_tokens=False)["input_ids"], 1]
        for r in rows
        for c in ("response_0", "response_1")
    ]
    return {"prompts": len(prompts), "responses": len(ids), "tokens": sum(map(len, ids))}


METHODS = {"ours": ours, "one by one": one_by_one}


def measure(method: str, source: Path, tokenizer_folder: Path) -> None:
    import datasets  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoTokenizer

    import data_prep.prompts.preference_rows  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measured = METHODS[method](source, tokenizer, Path(folder))
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            measured
            | {
                "wall": wall,
                "cpu": cpu,
                "peak": after.ru_maxrss / 2**10,
                "start": before.ru_maxrss / 2**10,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer; default: one trained on the rows"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), Path(options.measure[2]))
        return
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }  # as the commands set it
    print(
        "| rows from | | wall, s | CPU, s | peak, MB | after the imports, MB | responses | tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder), options.prompts)
        if options.tokenizer is None:
            make_tokenizer(Path(folder))
        tokenizer = options.tokenizer or Path(folder) / "tokenizer"
        for file in ("pku.jsonl", "pku.parquet"):
            for method in METHODS:
                command = [
                    sys.executable,
                    "-m",
                    __spec__.name,
                    "--measure",
                    method,
                    str(Path(folder) / file),
                    str(tokenizer),
                ]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                measured = json.loads(done.stdout.splitlines()[-1])
                cells = [
                    f"{measured[k]:.{d}f}"
                    for k, d in (("wall", 1), ("cpu", 1), ("peak", 0), ("start", 0))
                ]
                counts = [f"{measured['responses']:,}", f"{measured['tokens']:,}"]
                print(
                    f"| {Path(file).suffix[1:]} | {method} | " + " | ".join(cells + counts) + " |",
                    flush=True,
                )
                if method == "ours":
                    print(
                        json.dumps(
                            {k: measured[k] for k in ("seconds", "prompts", "pairs", "left_out")}
                        ),
                        file=sys.stderr,
                    )


if __name__ == "__main__":
    main()
