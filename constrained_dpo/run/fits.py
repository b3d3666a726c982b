"""The fits of a round: relabel and fit in stretches, with fresh samples of the policy between."""

import shutil
from functools import partial
from pathlib import Path

from constrained_dpo.fit.stretch import Stretch
from constrained_dpo.launch import is_main, wait
from constrained_dpo.learners.collect import collect
from constrained_dpo.learners.protocol import FitJob
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import MORE_FITS, RunDirectory
from constrained_dpo.run.phases import Round
from constrained_dpo.run.prepare import drop_shards
from constrained_dpo.run.relabel import write_labels
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.settings import derive_seed


def fit_policy(this: Round, output: Path, attempt: int) -> None:
    """Fit the round's adapter, or family, in as many stretches as the recipe says.

    output: the folder that appears last; attempt: fits of this round that went before.
    """
    run, recipe, number = this.run, this.recipe, this.number
    count = recipe.stretches
    first, grouped = attempt * count, recipe.fit.grouped
    for stretch in range(first, first + count):
        last = stretch == first + count - 1
        labels = run.labels_file(number, grouped, stretch)
        folder = run.refresh_folder(number, stretch)
        refreshed = run.refresh_file(number, stretch)
        if output.exists():
            continue
        relabel = partial(write_labels, run, recipe, this.law, this.lambda_, number, stretch)
        this.phase("relabel", labels.exists(), relabel)
        fitted = not last and (folder / "checkpoint").exists()
        this.phase("fit", fitted, partial(_fit, this, output, stretch, first), shared=True)
        if not last:
            this.phase("refresh", refreshed.exists(), partial(_refresh, this, stretch), shared=True)
    if is_main():
        for stretch in range(first, first + count):
            drop_shards(run, _refresh_phase(number, stretch))
        shutil.rmtree(run.refresh_folder(number, first).parent, ignore_errors=True)
        shutil.rmtree(run.checkpoints_folder(number), ignore_errors=True)
    wait()


def _fit(this: Round, output: Path, stretch: int, first: int) -> None:
    """One stretch of a fit; the fit starts from the round's last family, or the last round's."""
    run, recipe, number = this.run, this.recipe, this.number
    count = recipe.stretches
    last = stretch == first + count - 1
    folder = run.refresh_folder(number, stretch)
    folder.mkdir(parents=True, exist_ok=True)
    before = run.refresh_folder(number, stretch - 1) / "checkpoint"
    job = FitJob(
        labels=read_parquet(run.labels_file(number, recipe.fit.grouped, stretch)),
        pool=run.pool(recipe, number, stretch),
        lambda_=this.lambda_,
        tail_points=recipe.problem.tail_points,
        round_number=number,
        seed=derive_seed(recipe.seed, number, "fit", first),
        previous=_previous(run, recipe, number, first // count),
        output=output if last else folder / "policy",
        logs=run.logs_folder(f"round-{number:03d}"),
        checkpoints=run.checkpoints_folder(number),
        family=this.family,
        stretch=Stretch(
            number=stretch - first,
            count=count,
            begin=before if stretch > first else None,
            keep=None if last else folder / "checkpoint",
        ),
        loss=this.loss,
    )
    this.learner.fit(job)


def _previous(run: RunDirectory, recipe: Recipe, number: int, attempt: int) -> Path | None:
    """Where a fit starts: the round's family before it, or the last round's policy."""
    if attempt:
        return run.family_folder(number, attempt - 1)
    if not number or not recipe.fit.warm_start:
        return None
    if recipe.fit.conditional is None:
        return run.adapter_folder(number - 1)
    return last_family(run, number - 1)


def last_family(run: RunDirectory, number: int) -> Path:
    """Find the family that a round's adapter is a member of."""
    attempts = [a for a in range(MORE_FITS + 1) if run.family_folder(number, a).exists()]
    return run.family_folder(number, max(attempts, default=0))


def _refresh(this: Round, stretch: int) -> None:
    """Sample the policy of a stretch on the dual prompts; what it answers joins the pool."""
    run, recipe, number = this.run, this.recipe, this.number
    folder = run.refresh_folder(number, stretch)
    adapter = folder / "policy"
    if recipe.fit.conditional is not None:
        adapter = folder / "adapter"
        if is_main():
            shutil.rmtree(adapter, ignore_errors=True)
            this.learner.write_member(folder / "policy", this.lambda_, 1.0, adapter)
        wait()
    phase = _refresh_phase(number, stretch)
    responses = max(1, recipe.dual.responses_per_prompt // recipe.stretches)
    job = this.collection(phase, f"refresh:{number}.{stretch}", responses, adapter)
    samples = collect(this.learner, this.dual, job)
    if is_main():
        write_parquet(samples, run.refresh_file(number, stretch))


def _refresh_phase(number: int, stretch: int) -> str:
    return f"round-{number:03d}-refresh-{stretch}"
