"""Sampling and log-probabilities where a prompt gets several responses: computed once
beside computed per response.

    python -m benchmarks.bench_sampling [--responses 8] [--batch 64] [--repeats 3]

The 15M-parameter Llama of bench_fit.py, prompts of 100–130 tokens, 32 new tokens; *plain* is
transformers' `generate` on rows that repeat the prompt, *continuous* its continuous batching
(`generate_batch`) of all of them. CPU seconds of one process, taking turns. Repeated responses:
log-probabilities of a batch in which every response occurs twice, beside one in which all differ.
By length: prompts of 8 to 160 tokens, half of them below 36, sampled and read in batches of like
length, as a run does, beside batches in the prompts' order.
"""

import argparse
import time

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.bench_fit import VOCABULARY, fifteen_million
from data_prep.sampling.generate import generate
from data_prep.sampling.law import SamplingSettings, generation_arguments
from data_prep.sampling.logprobs import response_logps

PROMPTS = 16


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def told(name: str, ours: tuple[float, ...], other: tuple[float, ...]) -> None:
    ratios = np.divide(other, ours)
    spread = f"{np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
    print(
        f"{name}: {np.median(ours):.1f} beside {np.median(other):.1f} CPU seconds, ratio {spread}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    policy, rng = fifteen_million(), np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, rng.integers(100, 131)).tolist() for _ in range(PROMPTS)]
    rows = [prompt for prompt in prompts for _ in range(arguments.responses)]
    batches = [rows[i : i + arguments.batch] for i in range(0, len(rows), arguments.batch)]
    settings = SamplingSettings(max_new_tokens=32, batch_size=arguments.batch)
    config = GenerationConfig(**generation_arguments(settings, policy.eos_ids, 0))

    def plainly() -> None:
        for batch in batches:
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            policy.model.generate(ids, attention_mask=(ids != 0).long(), generation_config=config)

    def once() -> None:
        for batch in batches:
            generate(policy, policy.model, batch, settings, 0)

    def continuously() -> None:
        pages = ContinuousBatchingConfig(num_blocks=len(rows), max_batch_tokens=2048, seed=0)
        policy.model.generate_batch(
            rows, generation_config=config, continuous_batching_config=pages, warmup=False
        )

    times = [
        (seconds(once), seconds(plainly), seconds(continuously)) for _ in range(arguments.repeats)
    ]
    ours, plain, continuous = zip(*times, strict=True)
    what = f"{len(rows)} responses, {arguments.responses} a prompt, {arguments.batch} at once"
    told(f"{what}, ours beside plain", ours, plain)
    told(f"{what}, ours beside continuous", ours, continuous)
    different = [rng.integers(3, VOCABULARY, 32).tolist() for _ in rows]
    twice = [different[i - i % 2] for i in range(len(rows))]

    def logps(responses: list[list[int]]) -> None:
        response_logps(policy.model, rows, responses, pad_id=0, batch_size=arguments.batch)

    times = [
        (seconds(lambda: logps(twice)), seconds(lambda: logps(different)))
        for _ in range(arguments.repeats)
    ]
    ours, plain = zip(*times, strict=True)
    told("log-probabilities, every response twice beside all different", ours, plain)
    lengths = np.geomspace(8, 160, 4 * PROMPTS).astype(int)
    mixed = [rng.integers(3, VOCABULARY, n).tolist() for n in rng.permutation(lengths)]

    def both(prompts: list[list[int]]) -> None:
        rows = [prompt for prompt in prompts for _ in range(arguments.responses)]
        for i in range(0, len(rows), arguments.batch):
            batch = rows[i : i + arguments.batch]
            drawn = generate(policy, policy.model, batch, settings, i)
            response_logps(policy.model, batch, drawn, pad_id=0, batch_size=arguments.batch)

    by_length = sorted(mixed, key=len, reverse=True)
    times = [
        (seconds(lambda: both(by_length)), seconds(lambda: both(mixed)))
        for _ in range(arguments.repeats)
    ]
    ours, plain = zip(*times, strict=True)
    told("sampling and log-probabilities, by length beside in order", ours, plain)


if __name__ == "__main__":
    main()
