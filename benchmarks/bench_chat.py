"""Sampling a published chat model and its log-probabilities, beside how they were done at first.

    python -m benchmarks.bench_chat FOLDER [--prompts 8] [--responses 8] [--repeats 2] [--profile]

FOLDER: SmolLM2-135M-Instruct as `data-prep smollm2` writes it. The first everyday questions, 48 new
tokens, temperature 0.7, bfloat16, π_ref. *Before*: transformers' `generate` behind the prompts'
keys and values, every row until the last one has ended; then every row's prompt and response in one
forward, its head on states that do not lie side by side. CPU seconds of one process, taking turns;
tokens that were drawn per CPU second. --profile: the operations that take sampling's time instead.
"""

import argparse
import time

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from data_prep.everyday import question_rows
from data_prep.models.policy import Policy, load_policy
from data_prep.models.settings import PolicySettings
from data_prep.sampling.generate import generate
from data_prep.sampling.law import SamplingSettings, generation_arguments
from data_prep.sampling.logprobs import response_logps
from data_prep.sampling.prompt_cache import PromptRows

SETTINGS = SamplingSettings(max_new_tokens=48, batch_size=64)


def prompts_of(policy: Policy, count: int) -> list[list[int]]:
    """The first questions, as the policy reads them."""
    rows = [(row.content or {})["prompt"] for row in question_rows("train")][:count]
    encode = policy.tokenizer.apply_chat_template
    return [encode(row, add_generation_prompt=True, return_dict=False) for row in rows]


def generate_before(policy: Policy, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """Keys and values of all but the prompts' last tokens, then transformers' `generate`."""
    pad_id = policy.tokenizer.pad_token_id
    rows = PromptRows.of(prompts, pad_id, policy.device)
    config = GenerationConfig(**generation_arguments(SETTINGS, policy.eos_ids, pad_id))
    torch.manual_seed(seed)
    with torch.no_grad():
        cache = policy.model(
            input_ids=rows.ids[:, :-1],
            attention_mask=rows.mask[:, :-1],
            position_ids=(rows.mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_select_indices(rows.rows)
        output = policy.model.generate(
            input_ids=rows.ids[rows.rows],
            attention_mask=rows.mask[rows.rows],
            generation_config=config,
            past_key_values=cache,
        )
    drawn = []
    for row in output[:, rows.width :].tolist():
        ends = [i for i, token in enumerate(row) if token in policy.eos_ids]
        drawn.append(row[: ends[0] + 1] if ends else row)
    return drawn


def logps_before(policy: Policy, prompts: list[list[int]], drawn: list[list[int]]) -> np.ndarray:
    """Prompts padded on the left and responses on the right, all in one forward."""
    pad_id = policy.tokenizer.pad_token_id
    rows, width = PromptRows.of(prompts, pad_id, policy.device), max(map(len, drawn))
    chosen = torch.tensor([row + [-1] * (width - len(row)) for row in drawn])
    mask = torch.cat([rows.mask[rows.rows], (chosen >= 0).long()], dim=1)
    with torch.no_grad():
        logits = policy.model(
            input_ids=torch.cat([rows.ids[rows.rows], chosen.clamp(min=0)], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=width + 1,
            use_cache=False,
        ).logits[:, :-1]
        steps = logits[chosen >= 0].float().log_softmax(-1)
        logps = steps.gather(1, chosen[chosen >= 0][:, None])[:, 0].double()
    table = torch.zeros(chosen.shape, dtype=torch.float64).masked_scatter(chosen >= 0, logps)
    return table.sum(1).numpy()


def play(policy: Policy, prompts: list[list[int]], name: str, seed: int) -> dict[str, float]:
    """Tokens per CPU second of sampling, log-probabilities and both, now or before."""
    start = time.process_time()
    if name == "now":
        drawn = generate(policy, policy.model, prompts, SETTINGS, seed)
    else:
        drawn = generate_before(policy, prompts, seed)
    sampled = time.process_time()
    if name == "now":
        how = {"pad_id": policy.tokenizer.pad_token_id, "batch_size": SETTINGS.batch_size}
        response_logps(policy.model, prompts, drawn, **how)
    else:
        logps_before(policy, prompts, drawn)
    done, tokens = time.process_time(), sum(map(len, drawn))
    seconds = {"sampling": sampled - start, "log-probabilities": done - sampled}
    seconds["both"] = done - start
    print(f"{name}: {tokens} tokens, CPU seconds {seconds}", flush=True)
    return {part: tokens / value for part, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    settings = PolicySettings(model=arguments.folder, quantization="none", temperature=0.7)
    policy = load_policy(settings)
    distinct = prompts_of(policy, arguments.prompts)
    prompts = [prompt for prompt in distinct for _ in range(arguments.responses)]
    if arguments.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            generate(policy, policy.model, prompts, SETTINGS, 0)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))
        return
    turns = [
        {name: play(policy, prompts, name, seed) for name in ("now", "before")}
        for seed in range(arguments.repeats)
    ]
    for part in ("sampling", "log-probabilities", "both"):
        now, before = (np.array([t[name][part] for t in turns]) for name in ("now", "before"))
        ratios = now / before
        print(
            f"{part}: {np.median(now):.0f} beside {np.median(before):.0f} tokens per CPU second, "
            f"ratio {np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
        )


if __name__ == "__main__":
    main()
