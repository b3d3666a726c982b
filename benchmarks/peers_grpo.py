"""The peer of bench_peers that a TRL user would write first: `GRPOTrainer` on r + λ·g, λ by dual
ascent from each batch."""

import logging
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers_preferences import Budget, Looks
from constrained_dpo import Run
from constrained_dpo.run.play import open_prepared
from data_prep.models.policy import Policy, load_policy
from data_prep.readers.tables import read_parquet
from data_prep.sampling.generate import decode

GROUP = 8  # answers of a prompt in a step, as in the recipe's groups
WARMUP = 10
log = logging.getLogger(__name__)


class PlainHeadTrainer(GRPOTrainer):
    """GRPOTrainer whose log-probabilities come from the model's own logits.

    TRL's fused head reads the head's weight and leaves an adapter on it out, which this world
    needs (docs/benchmarks.md, "What limited it").
    """

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1
        ).logits[:, :-1]
        table = logits.float().log_softmax(dim=-1)
        chosen = input_ids[:, -logits_to_keep:, None]
        entropies = -(table.exp() * table).sum(dim=-1).detach()
        return table.gather(2, chosen)[..., 0], entropies, None


class DualAscent(TrainerCallback):
    """λ ← [λ − η(ḡ − a)]₊ after every step, ḡ the batch's mean utility.

    level: a; rate: η at the first step, which falls to 0 with the learning rate's cosine.
    """

    def __init__(self, lambda_: float, level: float, rate: float) -> None:
        self.lambda_, self.level, self.rate = lambda_, level, rate
        self.utility = level
        self.path: dict[int, float] = {}

    def on_step_end(self, args, state, control, **kwargs):
        left = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * state.global_step / state.max_steps)))
        step = self.rate * float(left) * (self.utility - self.level)
        self.lambda_ = max(0.0, self.lambda_ - step)
        self.path[state.global_step] = self.lambda_


def grpo_config(beta: float, budget: Budget, rate: float, seed: int, folder: Path) -> GRPOConfig:
    """Settings under which GRPO's objective is E[r + λ·g] − β·KL, but for its KL's credit.

    `scale_rewards` and `loss_type` are not TRL's defaults: divided by a group's std, advantages
    would have another scale at every prompt than β, and a mean over tokens would weigh an answer by
    its length. With `dr_grpo` a batch's loss is the sum over all tokens of −A + β·kl, over a
    constant. kl is Schulman's k3 of a token; times the importance ratio (`use_bias_correction_kl`)
    its gradient is that of the next token's KL. What a token does to the KL of later tokens is in
    no gradient: that is TRL's estimator.
    """
    return GRPOConfig(
        output_dir=str(folder),
        beta=beta,
        loss_type="dr_grpo",
        scale_rewards="none",
        use_bias_correction_kl=True,
        num_generations=GROUP,
        per_device_train_batch_size=budget.sequences,
        gradient_accumulation_steps=1,
        max_completion_length=3,
        temperature=1.0,
        max_steps=budget.steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        max_grad_norm=1.0,
        disable_dropout=False,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=100,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )


def play_grpo(run: Run, budget: Budget, rate: float, dual_rate: float) -> dict:
    """Train by GRPO on the run's fit and dual prompts, from λ_0 of its samples."""
    recipe, learner = open_prepared(run.directory)
    problem = recipe.problem
    (name,) = problem.names
    pool = read_parquet(run.directory.pool_file(None))
    level = float(pool[name].mean()) + float(problem.constraints[0].margin or 0.0)
    ascent = DualAscent(run.directory.state().lambda_[0][name], level, dual_rate)
    policy, scorers = load_policy(recipe.policy), learner.scorers

    def lagrangian(prompts, completions, completion_ids, **kwargs) -> list[float]:
        texts = decode(policy, completion_ids)
        reward = scorers[problem.reward].score(prompts, texts)
        utility = scorers[name].score(prompts, texts)
        ascent.utility = float(sum(utility) / len(utility))
        return [r + ascent.lambda_ * g for r, g in zip(reward, utility, strict=True)]

    prompts = learner.prompts[learner.prompts["split"] != "test"]
    texts = prompts["prompt"].tolist()
    tokens = [learner.prompt_tokens[pid] for pid in prompts["prompt_id"]]
    if policy.tokenizer(texts)["input_ids"] != tokens:
        raise ValueError("TRL would read other prompts than the run does")
    looks = Looks(budget.look, run.path / "looks")
    args = grpo_config(problem.beta, budget, rate, recipe.seed, run.path / "peer")
    args.max_completion_length = recipe.sampling.max_new_tokens
    trainer = _trainer(policy, recipe.policy.lora, args, lagrangian, texts)
    for callback in (ascent, looks):
        trainer.add_callback(callback)
    started = time.process_time()
    trainer.train()
    return {
        "adapters": looks.adapters(),
        "lambda": {step: {name: ascent.path[step]} for step in looks.adapters()},
        "sequences": budget.steps * budget.sequences,
        "sampled": budget.steps * budget.sequences + len(pool),
        "seconds": time.process_time() - started,
    }


def _trainer(policy: Policy, lora, args: GRPOConfig, lagrangian, texts: list[str]) -> GRPOTrainer:
    """The trainer on the base and a float32 adapter, on the head too."""
    head = policy.model.get_output_embeddings()
    policy.model.get_output_embeddings = lambda: head  # TRL refuses an adapter there
    trainer = PlainHeadTrainer(
        model=policy.model,
        reward_funcs=lagrangian,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=policy.tokenizer,
        peft_config=LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    del policy.model.get_output_embeddings
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # in bf16, TRL's choice, small steps would be lost
            parameter.data = parameter.data.float()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer
