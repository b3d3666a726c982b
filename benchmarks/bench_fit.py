"""`make bench-fit`: pairs per second of our fit beside the installed TRL's DPOTrainer, same model,
LoRA, rows and batch, in one process.

    python -m benchmarks.bench_fit [--steps 2] [--repeats 3] [--checkpointing]

A 15M-parameter Llama (6 layers of width 288, 32,000 words, random weights), float32, LoRA r = 8 on
all linear layers, prompts of 100–130 tokens, responses of 60–140, batches of 8 pairs. The variants
take turns, so a busy machine slows all of them. TRL with precomputed reference log-probabilities is
charged for computing them, since relabelling repeats it every round.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig
from transformers.integrations.liger import apply_liger_kernel
from trl import DPOTrainer

from constrained_dpo.fit.build import build_trainer, training_config
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.recipe.fit import FitSettings
from data_prep.models.policy import Policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.sampling.logprobs import response_logps

LORA = LoraSettings(r=8, alpha=16, dropout=0.0)
BETA, BATCH, VOCABULARY = 0.1, 8, 32000


class PlainTRL(DPOTrainer):
    """The installed trainer on rows that are tokenized already, which spares it that work."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def fifteen_million() -> Policy:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab_size": VOCABULARY,
    }
    config = transformers.LlamaConfig(
        **shape, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    settings = PolicySettings(model="random", quantization="none", dtype="float32", device="cpu")
    return policy_of(transformers.LlamaForCausalLM(config), settings)


def word_tokenizer(words: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of so many words, <pad>, <s> and </s> the first of them."""
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, words))]
    level = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(level), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def peft_lora() -> LoraConfig:
    """The benchmarks' adapter as PEFT has it."""
    return LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def policy_of(model: transformers.PreTrainedModel, settings: PolicySettings) -> Policy:
    """A model in memory as the policy that `load_policy` makes of a checkpoint."""
    return Policy(
        model=model.eval().requires_grad_(False),
        tokenizer=word_tokenizer(3),
        settings=settings,
        eos_ids=(2,),
        overridden={},
        fingerprint="random",
    )


def rows_of(policy: Policy, count: int, responses: int) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    ids = lambda low, high: rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist()
    prompts, drawn = (
        [ids(100, 131) for _ in range(count)],
        [[ids(60, 141) for _ in range(responses)] for _ in range(count)],
    )
    flat = [p for p in prompts for _ in range(responses)], [r for row in drawn for r in row]
    logps = response_logps(policy.model, *flat, pad_id=0, batch_size=BATCH)
    table = {
        "prompt_ids": prompts,
        "responses_ids": drawn,
        "ref_logps": logps.astype(np.float32).reshape(count, responses),
    }
    scores = rng.normal(size=(count, responses)).astype(np.float32)
    ones = np.ones(count, np.float32)
    labels = {"target": ones, "weight": ones} if responses == 2 else {"scores": scores}
    return datasets.Dataset.from_dict(table | labels)


def settings_of(checkpointing: bool, **changes) -> FitSettings:
    keys = {
        "steps": 1000,
        "batch_size": BATCH,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "gradient_checkpointing": checkpointing,
    }
    return FitSettings(**keys | changes)


def trl_trainer(
    policy: Policy, rows: datasets.Dataset, checkpointing: bool, precompute: bool, folder: Path
) -> DPOTrainer:
    arguments = training_config(FitPlan(settings_of(checkpointing), LORA, BETA, 0, folder), "cpu")
    arguments.precompute_ref_log_probs = precompute
    responses = rows["responses_ids"]
    columns = {
        "prompt_ids": rows["prompt_ids"],
        "chosen_ids": [c for c, _ in responses],
        "rejected_ids": [r for _, r in responses],
    }
    return PlainTRL(
        model=policy.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=policy.tokenizer,
        peft_config=peft_lora(),
    )


def settled() -> float:
    """The time when the GPU, where there is one, has done what it was given; seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Runner:
    """Some optimizer steps of a trainer at a time, through its own training_step and optimizer,
    seconds per response."""

    def __init__(
        self, trainer: DPOTrainer, responses_per_step: int, extra_seconds_per_response: float = 0.0
    ) -> None:
        self.trainer, self.responses_per_step, self.extra = (
            trainer,
            responses_per_step,
            extra_seconds_per_response,
        )
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.current_gradient_accumulation_steps = (
            1  # what Trainer.train() sets before it calls training_step
        )
        arguments = trainer.args  # Trainer.train() switches these two on, which nobody calls here
        if arguments.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        if arguments.use_liger_kernel:
            apply_liger_kernel(trainer.model, arguments.liger_kernel_config)
        trainer.model.train()
        self.batches = iter(trainer.get_train_dataloader())

    def seconds_per_response(self, steps: int) -> float:
        begin = settled()
        for _ in range(steps):
            try:
                batch = next(self.batches)
            except StopIteration:
                self.batches = iter(self.trainer.get_train_dataloader())
                batch = next(self.batches)
            self.trainer.training_step(self.trainer.model, batch)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
        return (settled() - begin) / (steps * self.responses_per_step) + self.extra


def variants(policy: Policy, pairs: int, checkpointing: bool, folder: Path) -> dict[str, Runner]:
    rows, groups = rows_of(policy, pairs, 2), rows_of(policy, pairs // 2, 4)
    runners = {
        "TRL": Runner(
            trl_trainer(copy.deepcopy(policy), rows, checkpointing, False, folder), 2 * BATCH
        )
    }
    begin = time.perf_counter()
    trainer = trl_trainer(copy.deepcopy(policy), rows, checkpointing, True, folder)
    precompute = (time.perf_counter() - begin) / (2 * pairs)
    runners["TRL, precomputed reference"] = Runner(trainer, 2 * BATCH, precompute)

    def ours(data: datasets.Dataset, size: int, **changes) -> Runner:
        settings = settings_of(
            checkpointing, batch_size=2 * BATCH // size, group_size=size, **changes
        )
        trainer = build_trainer(
            copy.deepcopy(policy), data, FitPlan(settings, LORA, beta=BETA, seed=0, output=folder)
        )
        assert (trainer.padded_because is None) == settings.shared_prompts, trainer.padded_because
        return Runner(trainer, 2 * BATCH)

    return runners | {
        "ours, padded rows": ours(rows, 2, shared_prompts=False),
        "ours, shared prompts": ours(rows, 2),
        "ours, shared prompts, by length": ours(rows, 2, group_by_length=True),
        "ours, groups of 4": ours(groups, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=2, help="optimizer steps of a variant per turn"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of every variant")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing on both sides"
    )
    arguments = parser.parse_args()
    policy = fifteen_million()
    size, threads = policy.model.num_parameters() / 1e6, torch.get_num_threads()
    print(f"{size:.1f}M parameters, {threads} threads, checkpointing {arguments.checkpointing}")
    with tempfile.TemporaryDirectory() as folder:
        runners = variants(policy, 4 * BATCH, arguments.checkpointing, Path(folder))
        for runner in runners.values():
            runner.seconds_per_response(1)
        turns = [
            {name: runner.seconds_per_response(arguments.steps) for name, runner in runners.items()}
            for _ in range(arguments.repeats)
        ]
    print("| fit | pairs/s (groups: responses/s ÷ 2) | × TRL (range over turns) |\n|---|---|---|")
    for name in runners:
        seconds = [turn[name] for turn in turns]
        ratios = [turn["TRL"] / turn[name] for turn in turns]
        print(
            f"| {name} | {0.5 / np.median(seconds):.2f} | {np.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
