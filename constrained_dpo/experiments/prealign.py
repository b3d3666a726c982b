"""Pre-alignment: DPO on the labels that a preference dataset comes with, by the same fit as a
round's.

β·log π/π_ref of the adapter is then an implicit reward (PeCAN, arXiv:2405.19544, and PeCAID,
arXiv:2505.19387, take it as scorer), and the adapter itself the baseline DPO-helpful or DPO-safe.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.fit.trainer import fit_adapter
from constrained_dpo.learners.dataset_answers import (
    answer_counts,
    collect_answers,
    tokenized_answers,
)
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.progress import Announce, silent, timed
from constrained_dpo.recipe.fit import FitSettings
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.files import hash_file, hold, sync_folder, write_json
from data_prep.prompts.preference_rows import given_pairs, labelled
from data_prep.prompts.split import split_prompts
from data_prep.settings import derive_seed
from data_prep.tables import validate_pairs, write_parquet

FACTS_FILE = "prealign.json"


ASKED_PAIRS = 1000
"""Labelled pairs that the finished adapter is asked about, of the fit and of the test prompts, at
most."""


def prealign(
    recipe: Recipe,
    column: str,
    output: Path,
    *,
    announce: Announce = silent,
    show_progress: bool = False,
) -> dict[str, object]:
    """Fits the recipe's LoRA adapter on the labels `column` of prompts.source and writes it to the
    new folder `output` (PEFT's format), with prealign.json; returns the facts in it.

    Trained on the pairs of the fit and dual prompts; those of the test prompts, where they are
    labelled, are only asked about. What a killed call left (log π_ref by shards, checkpoints of
    fit.save_steps) lies in `.OUTPUT.prealign` and is used by the same call again. Raises UserError
    for malformed rows, a column that is not there, an `output` that exists, and while another call
    works on it.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; choose a new folder for the adapter")
    settings = fit_settings(recipe.fit, column)
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    work = RunDirectory(output.with_name(f".{output.name}.prealign"))
    learner = LoraLearner(recipe, work, prompts, show_progress)
    left_out |= learner.restrict(recipe.fit.max_length)
    answers, table = tokenized_answers(learner, label=column)
    pairs = validate_pairs(labelled(given_pairs(answers), None), f"{column} pairs")
    work.path.mkdir(parents=True, exist_ok=True)
    with hold(work.path):
        agreement = _fit_and_ask(work, learner, pairs, table, settings, announce)
        adapter, trained = work.path / "adapter", int((learner.prompts["split"] != "test").sum())
        facts = {
            "labels": column,
            "pairs": len(pairs),
            "beta": recipe.objective.beta,
            "seed": recipe.seed,
            "policy": {
                "model": recipe.policy.model,
                "quantization": recipe.policy.quantization,
                "fingerprint": learner.policy.fingerprint,
            },
            "source": recipe.prompts.model_dump(mode="json")["source"],
            "prompts": {"fit": trained, "left_out": left_out},
            "answers": answer_counts(table, trained, answers.left_out),
            "agreement": agreement,
            "lora": recipe.policy.lora.model_dump(mode="json"),
            "fit": settings.model_dump(mode="json", exclude_defaults=True),
            "template": {"format": recipe.prompts.format, "template": recipe.prompts.template},
        }
        write_json(adapter / FACTS_FILE, facts)
        os.replace(adapter, output)
        sync_folder(output.parent)
        shutil.rmtree(work.path)
    return facts


def fit_settings(fit: FitSettings, column: str) -> FitSettings:
    """The recipe's fit settings for labelled pairs: the first round's; what cannot apply to them is
    set aside, with a line on stderr."""
    wanted = {"labels": "given", "label_column": column}
    unused = {
        "loss": "logistic",
        "group_size": 2,
        "holdout": 0.0,
        "early_stop": None,
        "report_to": [],
    }
    if odd := [key for key, value in unused.items() if getattr(fit, key) != value]:
        print(
            f"prealign: {', '.join(f'fit.{key}' for key in odd)} not used (labels are of pairs, "
            "and name no scores)",
            file=sys.stderr,
        )
    return fit.in_round(0).model_copy(update=wanted | unused)


def _fit_and_ask(
    work: RunDirectory,
    learner: LoraLearner,
    pairs: pd.DataFrame,
    table: pd.DataFrame,
    settings: FitSettings,
    announce: Announce,
) -> dict[str, dict | None]:
    """Fits the adapter in `work`, from what a killed call left there; returns its agreement with
    the labels, by split."""
    column = settings.label_column
    _own_shards(work, learner, table, column)
    scored: list[pd.DataFrame] = []
    timed(
        announce,
        "prealign: log π_ref of the answers",
        lambda: scored.append(
            collect_answers(work, learner, table, None, phase="answers", scored=False)
        ),
    )
    adapter = work.path / "adapter"
    if not adapter.exists():
        timed(
            announce,
            f"prealign: fit {len(pairs)} pairs",
            lambda: _fit(learner, pairs, scored[0], settings, adapter),
        )
    return {
        "fit": _agreement(learner, pairs, scored[0], adapter),
        "test": _test_agreement(learner, column, adapter),
    }


def _own_shards(work: RunDirectory, learner: LoraLearner, table: pd.DataFrame, column: str) -> None:
    """Drops what an earlier call with other answers, another policy or other settings left."""
    file, written = work.path / "answers.parquet", work.path / "identity.json"
    write_parquet(table, file)
    identity = {
        "policy": learner.policy.fingerprint,
        "recipe": learner.recipe.hash(),
        "answers": hash_file(file),
        "labels": column,
    }
    if not written.exists() or json.loads(written.read_text()) != identity:
        for leftover in ("shards", "adapter", ".checkpoints"):
            shutil.rmtree(work.path / leftover, ignore_errors=True)
        write_json(written, identity)


def _fit(
    learner: LoraLearner,
    pairs: pd.DataFrame,
    pool: pd.DataFrame,
    settings: FitSettings,
    output: Path,
) -> None:
    recipe = learner.recipe
    fit_adapter(
        learner.policy,
        pairs,
        pool,
        learner.prompt_tokens,
        settings,
        recipe.policy.lora,
        beta=recipe.objective.beta,
        seed=derive_seed(recipe.seed, 0, "prealign"),
        previous_adapter=None,
        output=output,
        checkpoints=output.with_name(".checkpoints"),
        show_progress=learner.show_progress,
    )


def _agreement(
    learner: LoraLearner, pairs: pd.DataFrame, pool: pd.DataFrame, adapter: Path
) -> dict[str, float]:
    """Share of pairs whose labelled answer has the larger log π/π_ref (ties count half), its
    standard error clustered by prompt, and the mean of β·(log-ratio of the labelled − of the other
    answer), reward units; of ASKED_PAIRS pairs at most."""
    some = pairs.iloc[
        np.linspace(0, len(pairs) - 1, min(len(pairs), ASKED_PAIRS)).round().astype(int)
    ]
    asked = pool[pool["response_id"].isin({*some["chosen_id"], *some["rejected_id"]})]
    ratio = pd.Series(
        learner.log_probabilities(asked, adapter) - asked["ref_logp"].to_numpy(),
        index=asked["response_id"],
    )
    margin = ratio.loc[some["chosen_id"]].to_numpy() - ratio.loc[some["rejected_id"]].to_numpy()
    right = pd.Series((margin > 0) + 0.5 * (margin == 0))
    share = float(right.mean())
    by_prompt = (right - share).groupby(some["prompt_id"].to_numpy()).sum()
    error = float(np.sqrt((by_prompt**2).sum())) / len(some)
    return {
        "pairs": len(some),
        "share": share,
        "se": error,
        "margin": learner.recipe.objective.beta * float(margin.mean()),
    }


def _test_agreement(learner: LoraLearner, column: str, adapter: Path) -> dict[str, float] | None:
    """`_agreement` on the test prompts' pairs; None where their source has no such labels."""
    try:
        answers, table = tokenized_answers(learner, label=column, test=True)
        pairs = given_pairs(answers).head(ASKED_PAIRS)
    except UserError as error:
        print(f"prealign: the test prompts' labels are not compared ({error})", file=sys.stderr)
        return None
    asked = table[table["response_id"].isin({*pairs["chosen_id"], *pairs["rejected_id"]})]
    return _agreement(
        learner, pairs, asked.assign(ref_logp=learner.log_probabilities(asked, None)), adapter
    )
