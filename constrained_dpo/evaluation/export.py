"""`cdpo export`: a round's policy to take away, as an adapter or merged into the unquantized base
and measured again, with a model card."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.evaluation.fresh import evaluation_prompts, write_evaluation
from constrained_dpo.evaluation.model_card import MERGED_DTYPE, model_card
from constrained_dpo.evaluation.record import Evaluation
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord
from data_prep.errors import UserError
from data_prep.files import sync_folder, write_json
from data_prep.models.adapters import merge_adapter
from data_prep.models.policy import resolve_model

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

GENERATION_CONFIG = "generation_config.json"


def export_adapter(run: RunDirectory, recipe: Recipe, number: int, output: Path) -> None:
    """Write a round's adapter in PEFT's format with a model card.

    Raises UserError when `output` holds something already.
    """
    require_free(output)
    temporary = new_folder(output)
    for name in ADAPTER_FILES:
        shutil.copy2(run.adapter_folder(number) / name, temporary / name)
    write_generation_config(temporary, recipe)
    record = RoundRecord.read(run.round_file(number))
    card = model_card(run, recipe, record, record.test, merged=False)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    publish(temporary, output)


def export_merged(run: RunDirectory, recipe: Recipe, number: int, output: Path) -> Evaluation:
    """Merge a round's adapter into the base in bfloat16, never into its quantized copy, and measure
    both again on the test prompts.

    The merged model is another policy than the one that was trained (quantization is gone), so its
    u is measured against the unquantized base's own mean, and its KL is to that base. Returns the
    measurement, which also lies in the output as measurement.json.
    """
    require_free(output)
    prompts, _ = evaluation_prompts(run, recipe, None, [])
    # A server that sampled the run does not serve the merged model.
    sampling = recipe.sampling.model_copy(update={"backend": "hf", "server": None})
    recipe = recipe.model_copy(update={"sampling": sampling})
    temporary = new_folder(output)
    whole = recipe.policy.model_copy(update={"quantization": "none", "dtype": MERGED_DTYPE})
    adapter, source = run.adapter_folder(number), resolve_model(whole)
    merge_adapter(whole, source, adapter, temporary, f"round {number}")
    at_output = {"model": str(temporary), "revision": None, "reference_adapter": None}
    merged_policy = whole.model_copy(update=at_output | {"allow_pickle": False})
    merged, base = (
        LoraLearner(recipe.model_copy(update={"policy": p}), prompts, run.score_cache)
        for p in (merged_policy, whole)
    )
    # Implicit scorers ask the run's own policy: loaded, where there are some, beside the one
    # that is measured.
    merged.scorers = LoraLearner(recipe, prompts, run.score_cache).scorers
    key = f"round-{number:03d}-merged"
    samples = _measured_again(run, recipe, merged, number, f"{key}-policy")
    merged.unload()  # one policy in memory at a time, and the scorers once
    base.scorers = merged.scorers
    reference = _measured_again(run, recipe, base, number, f"{key}-reference")
    ref_logp = base.log_probabilities(samples, None)
    # the merged model was alone in memory, so its KL is that of its samples' log-probabilities
    samples = samples.assign(ref_logp=ref_logp, path_kl=np.nan)
    record = write_evaluation(run, key, recipe, samples, reference, recipe.scorers)
    write_json(temporary / "measurement.json", record.to_json())
    write_generation_config(temporary, recipe)
    played = RoundRecord.read(run.round_file(number))
    card = model_card(run, recipe, played, record, merged=True)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    publish(temporary, output)
    return record


def _measured_again(
    run: RunDirectory, recipe: Recipe, learner: LoraLearner, number: int, phase: str
) -> pd.DataFrame:
    job = Collection(
        phase=phase,
        folder=run.shard_folder(phase),
        source=phase,
        responses_per_prompt=recipe.dual.responses_per_prompt,
        shard_size=recipe.sampling.shard_size,
        objectives=recipe.problem.columns,
        seed=recipe.seed,
        rule=None,
        round_number=number,
    )
    return collect(learner, learner.prompts, job)


def write_generation_config(folder: Path, recipe: Recipe) -> None:
    """Say in the folder's generation_config.json, beside what stands there, at which temperature
    the policy is served; nothing at 1."""
    temperature = recipe.policy.temperature
    if temperature == 1.0:
        return
    path = folder / GENERATION_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    law = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    write_json(path, content | law)


def require_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; give a new folder to export to")


def new_folder(output: Path) -> Path:
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); choose a writable folder"
        ) from error
    return temporary


def publish(temporary: Path, output: Path) -> None:
    """The folder appears whole or not at all."""
    if output.is_dir():
        output.rmdir()
    os.replace(temporary, output)
    sync_folder(output.parent)
