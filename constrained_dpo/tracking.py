"""tensorboard and wandb: the loss curves of every fit, through the Trainer, and one point per round
for λ, u, reward, KL and objective.

Logs are for eyes: nothing in a run reads them back, and a round that is played again after a kill
writes its own anew.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError

PROJECT = "constrained-dpo"


def require_trackers(report_to: Sequence[str]) -> None:
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
    defaults = {
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": PROJECT,
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
    }
    return {key: os.environ.get(key, value) for key, value in defaults.items()} | {
        "WANDB_DIR": str(folder)
    }


@contextmanager
def fit_logs(
    folder: Path | None, report_to: Sequence[str], resumed: bool = False
) -> Iterator[None]:
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


def log_round(
    folder: Path,
    scalars: dict[str, float],
    *,
    step: int,
    report_to: Sequence[str],
    name: str,
    identity: str,
) -> None:
    """Write one point per scalar at `step` to the trackers; written twice it is the same point.

    name: what the trackers call it; identity: of the run directory, whose rounds are one wandb run
    in whichever process they are played.
    """
    if "tensorboard" in report_to:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=str(folder)) as writer:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
    if "wandb" in report_to:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = _wandb_environment(folder)
        with wandb.init(
            project=settings["WANDB_PROJECT"],
            name=name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            mode=settings["WANDB_MODE"],
            settings=wandb.Settings(
                silent=settings["WANDB_SILENT"] == "true", console=settings["WANDB_CONSOLE"]
            ),
        ) as tracked:
            tracked.log({"round": step, **scalars}, step=step)
