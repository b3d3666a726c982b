"""The fits of bench_gpu.py, one per process, so that memory and kernels are each one's own.

    python -m benchmarks.gpu_cases SIZE CASE DEVICE OUTPUT.json

A randomly initialised Llama, NF4, LoRA r = 8 on all linear layers, gradient checkpointing, one
prompt's 8 responses a step. The model is built by `from_pretrained` from tensors in memory, where
all layers share one layer's random weights: nothing is downloaded or written, and what is quantized
and computed is the same as with weights of their own.
"""

import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers

from benchmarks.bench_fit import (
    BETA,
    LORA,
    PlainTRL,
    Runner,
    peft_lora,
    policy_of,
    settings_of,
    settled,
)
from constrained_dpo.fit.build import build_trainer, training_config
from constrained_dpo.fit.rows import UNSCORED
from constrained_dpo.fit.trainer import FitPlan
from data_prep.models.policy import Policy
from data_prep.models.quantization import check_quantization, keep_exact_on_cpu, quantization_config
from data_prep.models.settings import PolicySettings
from data_prep.sampling.logprobs import response_logps

OURS, OURS_PADDED, TRL, TRL_LIGER = "ours", "ours, padded rows", "TRL", "TRL, Liger layers"
FITS = (OURS, OURS_PADDED, TRL, TRL_LIGER)

RESPONSES = 8
FEWEST_STEPS, MOST_STEPS, STEP_SECONDS = 3, 8, 15.0


class Size:
    """A model, and its rows' tokens: prompt and response, the same in every row."""

    def __init__(self, prompt: int, response: int, **shape: object) -> None:
        self.prompt, self.response = prompt, response
        self.config = transformers.LlamaConfig(
            **shape, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        config, hidden = self.config, self.config.hidden_size
        keys = hidden // config.num_attention_heads * config.num_key_value_heads
        attention = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2
        matrices = attention + [(hidden, config.intermediate_size)] * 3  # the last one turned round
        self.layer_weights = config.num_hidden_layers * sum(a * b for a, b in matrices)
        self.adapter_weights = config.num_hidden_layers * sum(LORA.r * (a + b) for a, b in matrices)
        self.head_weights = config.vocab_size * hidden

    @property
    def bytes_needed(self) -> float:
        """About what a fit needs: weights (NF4 with its constants; embeddings and head in 16 bits),
        one checkpoint a layer, one layer's activations, 2 GB for logits and kernels."""
        config, tokens = self.config, RESPONSES * (self.prompt + self.response)
        outside = (1 if config.tie_word_embeddings else 2) * self.head_weights
        kept = config.num_hidden_layers * config.hidden_size + 8 * config.intermediate_size
        return 0.53 * self.layer_weights + 2 * outside + 2 * tokens * kept + 2e9


def llama(hidden: int, intermediate: int, layers: int, heads: tuple[int, int]) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }


WORDS = 128256
SIZES = {  # the shapes of Llama 3.2 1B and Llama 3.1 8B, and one for trying the script
    "1b": Size(
        256, 512, **llama(2048, 8192, 16, (32, 8)), vocab_size=WORDS, tie_word_embeddings=True
    ),
    "8b": Size(256, 512, **llama(4096, 14336, 32, (32, 8)), vocab_size=WORDS),
    "tiny": Size(24, 16, **llama(128, 256, 2, (2, 2)), vocab_size=512, tie_word_embeddings=True),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step computes. positions: tokens through the layers; pairs: (query, key) pairs that
    belong to one another, later keys counted too; scored: tokens through the head."""

    positions: int
    pairs: int
    scored: int


def work_of(batch: Mapping[str, torch.Tensor]) -> Work:
    """The work of a batch of ours, in either layout, or of TRL's."""
    rows, width = batch["input_ids"].shape
    if "segments" not in batch:
        labels = batch.get("labels")
        scored = batch["completion_mask"] > 0 if labels is None else labels != UNSCORED
        return Work(rows * width, rows * width**2, int(scored.sum()))
    pairs = 0
    for segments in batch["segments"]:
        shared, *responses = torch.bincount(segments[segments >= 0]).tolist()
        pairs += shared**2 + sum(length * (shared + length) for length in responses)
    return Work(rows * width, pairs, int((batch["next_tokens"] != UNSCORED).sum()))


def fit_flops(size: Size, work: Work) -> float:
    """Floating-point operations that a LoRA step's mathematics needs, none that are done again.

    A frozen weight costs 2 forward and 2 for its input's gradient, a trained one 2 more for its
    own; a pair of positions 4·hidden forward and twice that backward: the model FLOPs of PaLM's
    appendix B (arXiv:2204.02311; 6N + 12LHQT per token) without frozen weights' gradients.
    """
    a_position = 4.0 * size.layer_weights + 6.0 * size.adapter_weights
    a_pair = 12.0 * size.config.num_hidden_layers * size.config.hidden_size
    return a_position * work.positions + 4.0 * size.head_weights * work.scored + a_pair * work.pairs


def random_policy(size: Size, device: str) -> Policy:
    """A policy of the size in NF4 that computes in bfloat16, as `load_policy` makes it."""
    config, drawn = size.config, dict[str, torch.Tensor]()
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    torch.manual_seed(0)
    for name, like in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        source = re.sub(r"layers\.\d+\.", "layers.0.", name)
        if source not in drawn:
            ones = torch.ones(like.shape, dtype=torch.bfloat16, device=device)
            drawn[source] = ones if like.dim() == 1 else ones.normal_(std=0.02)
        drawn[name] = drawn[source]
    model = transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=drawn,
        dtype=torch.bfloat16,
        device_map={"": device},
        quantization_config=quantization_config("nf4", torch.bfloat16),
    )
    check_quantization(model, "nf4", "benchmark")
    keep_exact_on_cpu(model)
    settings = PolicySettings(model="random", quantization="nf4", device=device)
    return policy_of(model, settings)


class TimedTRL(PlainTRL):
    """The installed trainer, which notes how long each reference pass takes."""

    def compute_ref_log_probs(self, model, inputs):
        begin = settled()
        logps = super().compute_ref_log_probs(model, inputs)
        self.__dict__.setdefault("reference_seconds", []).append(settled() - begin)
        return logps


def trl_trainer(
    policy: Policy, groups: list[tuple[list[int], list[list[int]]]], liger: bool, folder: Path
) -> TimedTRL:
    """TRL on disjoint pairs of the groups' responses, as many responses a step as a group has."""
    settings = settings_of(True, batch_size=RESPONSES // 2)
    arguments = training_config(FitPlan(settings, LORA, BETA, 0, folder), policy.device.type)
    arguments.precompute_ref_log_probs, arguments.use_liger_kernel = True, liger
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second}
        for prompt, responses in groups
        for first, second in zip(responses[::2], responses[1::2], strict=True)
    ]
    return TimedTRL(
        model=policy.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=policy.tokenizer,
        peft_config=peft_lora(),
    )


def our_trainer(
    policy: Policy, groups: list[tuple[list[int], list[list[int]]]], shared: bool, folder: Path
):
    """Our fit on groups, listwise, and how long each group's reference pass took."""
    rng, seconds, rows = np.random.default_rng(1), [], []
    for prompt, responses in groups:
        begin = settled()
        logps = response_logps(
            policy.model, [prompt] * RESPONSES, responses, pad_id=0, batch_size=RESPONSES
        )
        seconds.append(settled() - begin)
        rows.append(
            {
                "prompt_ids": prompt,
                "responses_ids": responses,
                "ref_logps": logps.astype(np.float32).tolist(),
                "scores": rng.normal(size=RESPONSES).astype(np.float32).tolist(),
            }
        )
    settings = settings_of(
        True, batch_size=1, group_size=RESPONSES, loss="listwise", shared_prompts=shared
    )
    plan = FitPlan(settings, LORA, BETA, 0, folder)
    return build_trainer(policy, datasets.Dataset.from_list(rows), plan), seconds


def peak_memory() -> int | None:
    """The most bytes that torch held since the last call."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def play_fit(size: Size, case: str, device: str, folder: Path) -> dict[str, object]:
    """Reference log-probabilities of a step's responses, and steps: medians after a first one that
    does not count."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < size.bytes_needed:
            return {"not_run": f"needs {size.bytes_needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"}
    begin = time.perf_counter()
    policy, rng = random_policy(size, device), np.random.default_rng(0)
    ids = lambda length: rng.integers(3, size.config.vocab_size, length).tolist()
    groups = [
        (ids(size.prompt), [ids(size.response) for _ in range(RESPONSES)])
        for _ in range(MOST_STEPS + 1)
    ]
    built = settled() - begin
    peak_memory()
    if case in (TRL, TRL_LIGER):
        trainer = trl_trainer(policy, groups, case == TRL_LIGER, folder)
        reference, layout = trainer.reference_seconds, "padded"
    else:
        trainer, reference = our_trainer(policy, groups, case == OURS, folder)
        layout = "shared" if trainer.padded_because is None else trainer.padded_because
    work = work_of(next(iter(trainer.get_train_dataloader())))
    reference_peak, runner = peak_memory(), Runner(trainer, 1)
    runner.seconds_per_response(1)
    steps: list[float] = []
    while len(steps) < FEWEST_STEPS or (len(steps) < MOST_STEPS and sum(steps) < STEP_SECONDS):
        steps.append(runner.seconds_per_response(1))
    step, pass_seconds = float(np.median(steps)), float(np.median(reference[1:]))
    return {
        "layout": layout,
        "build_seconds": built,
        "step_seconds": steps,
        "reference_seconds": reference[1:],
        "seconds": step + pass_seconds,
        "tokens_per_second": RESPONSES * size.response / (step + pass_seconds),
        "work": dataclasses.asdict(work),
        "step_flops": fit_flops(size, work),
        "flops_per_second": fit_flops(size, work) / step,
        "reference_peak_bytes": reference_peak,
        "step_peak_bytes": peak_memory(),
    }


def main() -> None:
    name, case, device, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = play_fit(SIZES[name], case, device, Path(folder))
        except torch.OutOfMemoryError as error:
            result = {"not_run": f"out of memory ({str(error).splitlines()[0][:120]})"}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
