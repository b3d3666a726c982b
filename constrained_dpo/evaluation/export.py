"""`cdpo export`: a round's policy to take away, as an adapter or merged into the unquantized base
and measured again, with a model card."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd

from constrained_dpo.evaluation.evaluate import write_evaluation
from constrained_dpo.evaluation.model_card import MERGED_DTYPE, model_card
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.files import sync_folder
from data_prep.models.adapters import merge_adapter
from data_prep.models.policy import resolve_model
from data_prep.sampling.logprobs import response_logps

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_adapter(run: RunDirectory, recipe: Recipe, number: int, output: Path) -> None:
    """The adapter in PEFT's format with a model card. Raises UserError when `output` holds
    something already."""
    require_free(output)
    temporary = _new_folder(output)
    for name in ADAPTER_FILES:
        shutil.copy2(run.adapter_folder(number) / name, temporary / name)
    record = run.round_record(number)
    (temporary / "README.md").write_text(
        model_card(run, recipe, number, record["test"], merged=False), encoding="utf-8"
    )
    _publish(temporary, output)


def export_merged(
    run: RunDirectory, recipe: Recipe, number: int, output: Path, prompts: pd.DataFrame
) -> dict[str, object]:
    """The adapter merged into the base in bfloat16, never into its quantized copy; then both are
    sampled on the test prompts again.

    The merged model is another policy than the one that was trained (quantization is gone), so its
    u is measured against the unquantized base's own mean, and its KL is to that base. Returns the
    measurement, which also lies in the output as measurement.json.
    """
    require_free(output)
    # A server that sampled the run does not serve the merged model.
    recipe = recipe.model_copy(
        update={"sampling": recipe.sampling.model_copy(update={"backend": "hf", "server": None})}
    )
    temporary = _new_folder(output)
    whole = recipe.policy.model_copy(update={"quantization": "none", "dtype": MERGED_DTYPE})
    merge_adapter(
        whole, resolve_model(whole), run.adapter_folder(number), temporary, f"round {number}"
    )
    merged_policy = whole.model_copy(
        update={
            "model": str(temporary),
            "revision": None,
            "reference_adapter": None,
            "allow_pickle": False,
        }
    )
    merged = LoraLearner(recipe.model_copy(update={"policy": merged_policy}), run, prompts)
    base = LoraLearner(recipe.model_copy(update={"policy": whole}), run, prompts)
    # Implicit scorers ask the run's own policy: loaded, where there are some, beside the one
    # that is measured.
    merged.scorers = LoraLearner(recipe, run, prompts).scorers
    key = f"round-{number:03d}-merged"

    def draw(learner: LoraLearner, who: str) -> pd.DataFrame:
        return collect(
            run,
            learner,
            prompts,
            phase=f"{key}-{who}",
            round_number=number,
            responses_per_prompt=recipe.dual.responses_per_prompt,
            adapter=None,
            source=f"{key}-{who}",
            shard_size=recipe.sampling.shard_size,
            objectives=recipe.problem.objectives,
            seed=recipe.seed,
        )

    samples = draw(merged, "policy")
    merged.unload()  # one policy in memory at a time, and the scorers once
    base.scorers = merged.scorers
    reference = draw(base, "reference")
    ref_logp, _ = response_logps(
        base.policy.model,
        [base.prompt_tokens[pid] for pid in samples["prompt_id"]],
        [ids.tolist() for ids in samples["token_ids"]],
        pad_id=base.policy.tokenizer.pad_token_id,
        batch_size=recipe.sampling.batch_size,
    )
    measurement = write_evaluation(
        run, key, recipe, samples.assign(ref_logp=ref_logp), reference, recipe.problem.objectives
    )
    (temporary / "measurement.json").write_text(json.dumps(measurement, indent=2) + "\n")
    (temporary / "README.md").write_text(
        model_card(run, recipe, number, measurement, merged=True), encoding="utf-8"
    )
    _publish(temporary, output)
    return measurement


def require_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; give a new folder to export to")


def _new_folder(output: Path) -> Path:
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); choose a writable folder"
        ) from error
    return temporary


def _publish(temporary: Path, output: Path) -> None:
    """The folder appears whole or not at all."""
    if output.is_dir():
        output.rmdir()
    os.replace(temporary, output)
    sync_folder(output.parent)
