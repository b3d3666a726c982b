"""Peers of bench_peers that learn from a fixed set of preferences: SafeDPO and MODPO.

Both are one fit on answers of π_ref, by the installed trainer with another loss,
−log σ((β(ρ_w − ρ_l) − offset)/w) with ρ = log π_θ/π_ref. Preferences are drawn from the reward by
Bradley and Terry's law, as people's would be.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from benchmarks.family_tasks import Task, recipe_of
from constrained_dpo import Run
from constrained_dpo.fit.build import build_trainer
from constrained_dpo.fit.rows import pair_dataset
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.run.play import open_prepared
from data_prep.labels.preferences import label_pairs
from data_prep.models.policy import load_policy
from data_prep.readers.tables import read_parquet

OFFSET = "offset"
SPARE = 4  # times as many pairs are drawn as are read: SafeDPO leaves pairs out


@dataclass(frozen=True)
class Budget:
    """What every peer may use: optimizer steps, sequences in each, steps between two looks at the
    policy."""

    steps: int = 800
    sequences: int = 128
    look: int = 200


@dataclass(frozen=True)
class PeerTask:
    """One run of a peer. rate: the learning rate, None: the peer's own."""

    peer: str
    world: str
    seed: int
    scale: str
    steps: int
    rate: float | None = None

    @property
    def budget(self) -> Budget:
        return Budget(steps=self.steps, look=self.steps // 4)

    def words(self) -> str:
        """Name the peer in a table."""
        return self.peer if self.rate is None else f"{self.peer}, rate {self.rate:g}"

    def recipe(self, setting: str = "plain") -> dict:
        """The recipe of bench_family's setting, four rounds of the budget's steps."""
        task = Task(self.world, seed=self.seed, setting=setting, scale=self.scale)
        recipe = recipe_of(task)
        recipe["fit"] |= {"steps": self.budget.look}
        return recipe


class Looks(TrainerCallback):
    """Saves the adapter after every `every` steps, to folders named by the step."""

    def __init__(self, every: int, folder: Path) -> None:
        self.every, self.folder = every, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            folder = self.folder / f"{state.global_step:05d}"
            kwargs["model"].save_pretrained(str(folder), save_embedding_layers=False)

    def adapters(self) -> dict[int, Path]:
        """The folders by step."""
        return {int(folder.name): folder for folder in sorted(self.folder.iterdir())}


class WithOffsets:
    """A collator whose batches have the rows' offsets too, (num_rows,)."""

    def __init__(self, collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        offsets = torch.tensor([example[OFFSET] for example in examples], dtype=torch.float32)
        return self.collator(examples) | {OFFSET: offsets}


def offset_loss(
    log_ratio: torch.Tensor, offset: torch.Tensor, beta: float, weight: float = 1.0
) -> torch.Tensor:
    """−log σ((β(ρ_w − ρ_l) − offset)/weight); log_ratio: (num_pairs, 2) ρ of chosen and rejected,
    nats; offset: (num_pairs,) score units; returns (num_pairs,)."""
    return -F.logsigmoid((beta * (log_ratio[:, 0] - log_ratio[:, 1]) - offset) / weight)


def safe_pairs(pairs: pd.DataFrame, safe: pd.Series, delta: float) -> pd.DataFrame:
    """SafeDPO's pairs with their offsets; safe: bool by response_id.

    Source: SafeDPO, arXiv:2505.20065, §3, eqs. 11 and 12: −log σ(β(ρ_w − ρ_l) − (h_l − h_w)Δ),
    h = 1 of an unsafe answer, on pairs of which those with an unsafe winner and a safe loser are
    turned round, and those of two unsafe answers left out. The formula was taken from two
    restatements of the paper, not from its own text.
    """
    won, lost = (safe.loc[pairs[c]].to_numpy() for c in ("chosen_id", "rejected_id"))
    turn = lost & ~won
    both = {
        "chosen_id": pairs["chosen_id"].where(~turn, pairs["rejected_id"]),
        "rejected_id": pairs["rejected_id"].where(~turn, pairs["chosen_id"]),
        OFFSET: delta * (won != lost).astype(float),
    }
    return pairs.assign(**both)[won | lost].reset_index(drop=True)


def margin_pairs(pairs: pd.DataFrame, utility: pd.Series, weight: float) -> pd.DataFrame:
    """MODPO's pairs with their offsets; utility: by response_id, weight: w_{-k}.

    Source: L_MODPO of MODPO, arXiv:2310.03708, as its authors' code computes it: −log σ((1/w_k)
    (β(ρ_w − ρ_l) − w_{-k}·(r_{-k}(y_w) − r_{-k}(y_l)))) on the preferences of objective k.
    """
    won, lost = (utility.loc[pairs[c]].to_numpy() for c in ("chosen_id", "rejected_id"))
    return pairs.assign(**{OFFSET: weight * (won - lost)})


def play_safedpo(run: Run, delta: float, budget: Budget, rate: float) -> dict:
    """Fit SafeDPO; an answer is safe where its utility is at least the level a."""
    pool, pairs = _preferences(run, budget)
    problem = run.recipe.problem
    (name,) = problem.names
    level = float(problem.levels(pd.Series({name: pool[name].mean()}))[name])
    safe = pool.set_index("response_id")[name] >= level
    kept = safe_pairs(pairs, safe, delta)
    beta = problem.beta
    return _fit(run, kept, beta, 1.0, budget, rate) | {
        "safe": float(safe.mean()),
        "pairs_left": len(kept) / len(pairs),
    }


def play_modpo(run: Run, lambda_: float, budget: Budget, rate: float) -> dict:
    """Fit MODPO at the weights that stand for λ: w = (1, λ)/(1 + λ), and β w_k in place of β, so
    that its maximizer is that of r + λ·g at β."""
    pool, pairs = _preferences(run, budget)
    problem, weight = run.recipe.problem, 1 / (1 + lambda_)
    (name,) = problem.names
    rows = margin_pairs(pairs, pool.set_index("response_id")[name], weight * lambda_)
    return _fit(run, rows, weight * problem.beta, weight, budget, rate)


def _preferences(run: Run, budget: Budget) -> tuple[pd.DataFrame, pd.DataFrame]:
    """π_ref's scored answers, and preferences between them drawn from the reward alone."""
    pool, recipe = read_parquet(run.directory.pool_file(None)), run.recipe
    each = SPARE * budget.steps * budget.sequences // 2 // pool["prompt_id"].nunique()
    pairs = label_pairs(
        pool,
        recipe.problem.reward,
        recipe.problem.multipliers(dict.fromkeys(recipe.problem.names, 0.0)),
        labels="bernoulli",
        pairs_per_prompt=each,
        seed=recipe.seed,
    )
    return pool, pairs.sample(frac=1.0, random_state=recipe.seed)


def _fit(
    run: Run, pairs: pd.DataFrame, beta: float, weight: float, budget: Budget, rate: float
) -> dict:
    recipe, learner = open_prepared(run.directory)
    batch = budget.sequences // 2
    each = -(-budget.steps * batch // pairs["prompt_id"].nunique())
    pairs = pairs.groupby("prompt_id", sort=False).head(each).reset_index(drop=True)
    changes = {"steps": budget.steps, "batch_size": batch, "group_size": 2, "loss": "logistic"}
    changes |= {"learning_rate": rate, "conditional": None, "loraplus_ratio": 1.0}
    plan = FitPlan(
        settings=recipe.fit.in_round(0).model_copy(update=changes),
        lora=recipe.policy.lora,
        beta=beta,
        seed=recipe.seed,
        output=run.path / "peer",
    )
    pool = read_parquet(run.directory.pool_file(None))
    rows = pair_dataset(pairs, pool, learner.prompt_tokens, plan.settings.max_length)
    rows = rows.add_column(OFFSET, pairs[OFFSET].tolist())
    trainer = build_trainer(load_policy(recipe.policy), rows, plan)
    trainer.data_collator = WithOffsets(trainer.data_collator)
    looks = Looks(budget.look, run.path / "looks")
    trainer.add_callback(looks)

    def pair_loss(log_ratio: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
        losses = offset_loss(log_ratio, inputs[OFFSET], beta, weight)
        return (inputs["weight"] * losses).mean(), {}

    trainer._pair_loss = pair_loss
    started = time.process_time()
    trainer.train()
    return {
        "adapters": looks.adapters(),
        "sequences": budget.steps * budget.sequences,
        "sampled": len(pool),
        "seconds": time.process_time() - started,
    }
