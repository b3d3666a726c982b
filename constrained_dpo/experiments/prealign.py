"""Pre-alignment: DPO on the labels that a preference dataset comes with, by the same fit as a
round's.

β·log π/π_ref of the adapter is then an implicit reward (PeCAN, arXiv:2405.19544, and PeCAID,
arXiv:2505.19387, take it as scorer), and the adapter itself the baseline DPO-helpful or DPO-safe.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.estimates.intervals import mean_interval
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.learners.dataset_answers import (
    answer_counts,
    collect_answers,
    tokenized_answers,
)
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.progress import timed
from constrained_dpo.recipe.fit import FitSettings
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.files import hash_file, hold, sync_folder, write_json
from data_prep.prompts.preference_rows import given_pairs, labelled
from data_prep.prompts.split import split_prompts
from data_prep.readers.tables import write_parquet
from data_prep.settings import derive_seed
from data_prep.tables import validate_pairs

log = logging.getLogger(__name__)

FACTS_FILE = "prealign.json"

MAX_PAIRS = 1000
"""Labelled pairs that the finished adapter is compared with, of the fit and of the test prompts."""


@dataclass(frozen=True)
class _Workshop:
    """What one call works with; folder: shards and checkpoints that a killed call left."""

    folder: Path
    learner: LoraLearner
    settings: FitSettings
    column: str

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def prealign(recipe: Recipe, column: str, output: Path) -> dict[str, Any]:
    """Fit the recipe's LoRA adapter on the labels `column` of prompts.source and write it to the
    new folder `output` (PEFT's format), with prealign.json; return the facts in it.

    Trained on the pairs of the fit and dual prompts; those of the test prompts, where they are
    labelled, are only compared with. What a killed call left (log π_ref by shards, checkpoints of
    fit.save_steps) lies in `.OUTPUT.prealign` and is used by the same call again. Raises UserError
    for malformed rows, a column that is not there, an `output` that exists, and while another call
    works on it.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; choose a new folder for the adapter")
    # Its implicit reward is read at temperature 1, so there it is fitted.
    policy = recipe.policy.model_copy(update={"temperature": 1.0})
    recipe = recipe.model_copy(update={"policy": policy})
    settings = fit_settings(recipe.fit, column)
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, prompts)
    left_out |= learner.restrict(recipe.fit.max_length)
    answers, table = tokenized_answers(learner, label=column)
    pairs = validate_pairs(labelled(given_pairs(answers), None), f"{column} pairs")
    work = _Workshop(output.with_name(f".{output.name}.prealign"), learner, settings, column)
    work.folder.mkdir(parents=True, exist_ok=True)
    with hold(work.folder):
        agreement = _fit_and_compare(work, pairs, table)
        trained = int((learner.prompts["split"] != "test").sum())
        counts = answer_counts(table, trained, answers.left_out)
        facts = _facts(work) | {
            "pairs": len(pairs),
            "prompts": {"fit": trained, "left_out": left_out},
            "answers": counts,
            "agreement": agreement,
        }
        write_json(work.adapter / FACTS_FILE, facts)
        os.replace(work.adapter, output)
        sync_folder(output.parent)
        shutil.rmtree(work.folder)
    return facts


def _facts(work: _Workshop) -> dict[str, Any]:
    """What the adapter was made with."""
    recipe = work.learner.recipe
    return {
        "labels": work.column,
        "beta": recipe.objective.beta,
        "seed": recipe.seed,
        "policy": {
            "model": recipe.policy.model,
            "quantization": recipe.policy.quantization,
            "fingerprint": work.learner.policy.fingerprint,
        },
        "source": recipe.prompts.model_dump(mode="json")["source"],
        "lora": recipe.policy.lora.model_dump(mode="json"),
        "fit": work.settings.model_dump(mode="json", exclude_defaults=True),
        "template": {"format": recipe.prompts.format, "template": recipe.prompts.template},
    }


def fit_settings(fit: FitSettings, column: str) -> FitSettings:
    """Give the fit settings for labelled pairs: the first round's. What cannot apply to them is set
    aside, and logged."""
    labels = {"labels": "given", "label_column": column}
    unused = {
        "loss": "logistic",
        "group_size": 2,
        "holdout": 0.0,
        "early_stop": None,
        "report_to": [],
    }
    if odd := [f"fit.{key}" for key, value in unused.items() if getattr(fit, key) != value]:
        reason = "labels are of pairs, and name no scores"
        log.warning("prealign: %s not used (%s)", ", ".join(odd), reason)
    return fit.in_round(0).model_copy(update=labels | unused)


def _fit_and_compare(
    work: _Workshop, pairs: pd.DataFrame, table: pd.DataFrame
) -> dict[str, dict[str, float] | None]:
    """Fits the adapter, from what a killed call left; its agreement with the labels, by split."""
    _require_same_call(work, table)
    pool = pd.DataFrame()

    def ask_reference() -> None:
        nonlocal pool
        folder = work.folder / "shards" / "answers"
        pool = collect_answers(work.learner, table, folder, phase="answers", scored=False)

    timed("prealign: log π_ref of the answers", ask_reference)
    if not work.adapter.exists():
        timed(f"prealign: fit {len(pairs)} pairs", lambda: _fit(work, pairs, pool))
    return {"fit": _agreement(work, pairs, pool), "test": _test_agreement(work)}


def _require_same_call(work: _Workshop, table: pd.DataFrame) -> None:
    """Drops what an earlier call with other answers, another policy or other settings left."""
    file, written = work.folder / "answers.parquet", work.folder / "identity.json"
    write_parquet(table, file)
    identity = {
        "policy": work.learner.policy.fingerprint,
        "recipe": work.learner.recipe.hash(),
        "answers": hash_file(file),
        "labels": work.column,
    }
    if not written.exists() or json.loads(written.read_text()) != identity:
        for leftover in ("shards", "adapter", ".checkpoints"):
            shutil.rmtree(work.folder / leftover, ignore_errors=True)
        write_json(written, identity)


def _fit(work: _Workshop, pairs: pd.DataFrame, pool: pd.DataFrame) -> None:
    learner = work.learner
    plan = FitPlan(
        work.settings,
        learner.recipe.policy.lora,
        learner.recipe.objective.beta,
        seed=derive_seed(learner.recipe.seed, 0, "prealign"),
        output=work.adapter,
        checkpoints=work.folder / ".checkpoints",
    )
    fit_adapter(learner.policy, pairs, pool, learner.prompt_tokens, plan)


def _agreement(work: _Workshop, pairs: pd.DataFrame, pool: pd.DataFrame) -> dict[str, float]:
    """Share of pairs whose labelled answer has the larger log π/π_ref (ties count half), a mean
    over prompts with its 95 % interval, and the mean of β·(log-ratio of the labelled − of the other
    answer), reward units; of MAX_PAIRS pairs at most."""
    rows = np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_PAIRS)).round().astype(int)
    pairs = pairs.iloc[rows]
    answers = pool[pool["response_id"].isin({*pairs["chosen_id"], *pairs["rejected_id"]})]
    policy_logp = work.learner.log_probabilities(answers, work.adapter)
    ratio = pd.Series(policy_logp - answers["ref_logp"].to_numpy(), index=answers["response_id"])
    margin = ratio.loc[pairs["chosen_id"]].to_numpy() - ratio.loc[pairs["rejected_id"]].to_numpy()
    right = pd.Series((margin > 0) + 0.5 * (margin == 0))
    by_prompt = right.groupby(pairs["prompt_id"].to_numpy()).mean()
    low, high = mean_interval(by_prompt, 0.95, (0.0, 1.0))
    return {
        "pairs": len(pairs),
        "share": float(by_prompt.mean()),
        "low": low,
        "high": high,
        "margin": work.learner.recipe.objective.beta * float(margin.mean()),
    }


def _test_agreement(work: _Workshop) -> dict[str, float] | None:
    """`_agreement` on the test prompts' pairs; None where their source has no such labels."""
    learner = work.learner
    try:
        answers, table = tokenized_answers(learner, label=work.column, test=True)
        pairs = given_pairs(answers).head(MAX_PAIRS)
    except UserError as error:
        log.warning("prealign: the test prompts' labels are not compared (%s)", error)
        return None
    pool = table[table["response_id"].isin({*pairs["chosen_id"], *pairs["rejected_id"]})]
    pool = pool.assign(ref_logp=learner.log_probabilities(pool, None))
    return _agreement(work, pairs, pool)
