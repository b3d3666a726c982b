"""tensorboard and wandb: the loss curves of every fit, through the Trainer, and one point per round
for λ, u, reward, KL and objective.

Logs are for eyes: nothing in a run reads them back, and a round that is played again after a kill
writes its own anew.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError

PROJECT = "constrained-dpo"


def require_trackers(report_to: list[str]) -> None:
    """Raises UserError naming the trackers of `fit.report_to` that are not installed."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"fit.report_to: {' and '.join(missing)} not installed; pip install "
            "'constrained-dpo[tracking]', or take it out of the recipe"
        )


def _wandb_environment(folder: Path) -> dict[str, str]:
    """What wandb reads from the environment; the user's own values win. Offline: `wandb sync`
    uploads what the user wants to."""
    asked = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": PROJECT,
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }
    return {key: os.environ.get(key, value) for key, value in asked.items()} | {
        "WANDB_DIR": str(folder)
    }


@contextmanager
def fit_logs(folder: Path | None, report_to: list[str], resumed: bool = False) -> Iterator[None]:
    """Sends the Trainer's trackers to `folder` (emptied first, unless a fit goes on from a
    checkpoint: then the points behind it are there twice) while one fit lasts, by the environment
    variables that they read."""
    if folder is None or not report_to:
        yield
        return
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)  # of a fit that was killed
    folder.mkdir(parents=True, exist_ok=True)
    changed = {"TENSORBOARD_LOGGING_DIR": str(folder), **_wandb_environment(folder)}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        if "wandb" in report_to:
            import wandb

            wandb.finish()
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def round_scalars(record: dict) -> dict[str, float]:
    """A round's record (round.json) as scalars by tag, e.g. `u/harmless/test`; what the sampling
    law does not support is left out."""
    scalars = {f"lambda/{name}": value for name, value in record["lambda"].items()}
    for split, part in (("dual", record), ("test", record["test"])):
        scalars |= {f"u/{name}/{split}": value for name, value in part["u"].items()}
        scalars |= {
            f"{key}/{split}": part[key]
            for key in ("reward", "kl", "objective")
            if part[key] is not None
        }
    return scalars


def log_round(run: RunDirectory, recipe: Recipe, record: dict) -> None:
    """Writes one point per metric at step `round` to the recipe's trackers, under RUN/logs/rounds.
    A point written twice is the same."""
    folder, scalars = run.logs_folder("rounds"), round_scalars(record)
    if "tensorboard" in recipe.fit.report_to:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=str(folder)) as writer:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, record["round"])
    if "wandb" in recipe.fit.report_to:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = _wandb_environment(folder)
        with wandb.init(
            project=settings["WANDB_PROJECT"],
            name=f"{recipe.name}-rounds",
            # One wandb run for all rounds of a run directory, in whichever process they are
            # played.
            id=hashlib.sha256(f"{run.path.resolve()}/{recipe.hash()}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            mode=settings["WANDB_MODE"],
            settings=wandb.Settings(
                silent=settings["WANDB_SILENT"] == "true", console=settings["WANDB_CONSOLE"]
            ),
        ) as tracked:
            tracked.log({"round": record["round"], **scalars}, step=record["round"])
