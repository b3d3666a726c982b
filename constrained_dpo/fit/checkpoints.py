"""What a fit leaves on disk: its adapter, and checkpoints on the way there. The Trainer writes
those, this module says which are whole and whose they are.

A checkpoint counts once it holds a seal: the fit's identity and the hash of each of its files,
written last. One that a kill left half-written has none, and the one before it is used.
"""

import hashlib
import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import datasets
import pyarrow as pa
from accelerate import PartialState
from transformers import TrainerCallback

from constrained_dpo.launch import main_first, num_processes, shards_base
from constrained_dpo.recipe.fit import FitSettings
from data_prep.errors import UserError
from data_prep.files import hash_file, sync_folder, write_json
from data_prep.models.adapters import fingerprint_adapter
from data_prep.models.settings import LoraSettings

log = logging.getLogger(__name__)

SEAL = "seal.json"


KEPT = 2
"""The newest is written while the one before it is still there."""


def fit_identity(
    rows: datasets.Dataset,
    policy: str,
    settings: FitSettings,
    lora: LoraSettings,
    *,
    beta: float,
    seeds: tuple[int, int],
    previous_adapter: Path | None,
) -> str:
    """Hash of all that a fit's result depends on: its rows (and with them λ), base, recipe, seeds,
    start, processes and libraries.

    rows: before the split into fitted and held-out ones. policy: the base's fingerprint.
    """
    digest = hashlib.sha256()
    words = [
        policy,
        settings.model_dump(mode="json", exclude={"report_to"}),
        lora.model_dump(mode="json"),
        beta,
        seeds,
        None if previous_adapter is None else fingerprint_adapter(previous_adapter),
        num_processes(),  # each brings rows of its own to a step
        {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
    ]
    digest.update(json.dumps(words, sort_keys=True).encode())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.data.schema) as stream:
        stream.write_table(rows.data.table)
    digest.update(sink.getvalue())
    return digest.hexdigest()


def start_from(checkpoints: Path, identity: str) -> Path | None:
    """The checkpoint that a fit goes on from, or None; raises UserError where checkpoints cannot be
    written."""
    if shards_base():
        raise UserError(
            "fit.save_steps: checkpoints inside a fit are not written where the launch shards the "
            "base; set it to null"
        )
    with main_first():  # which removes what is not whole
        return newest_whole(checkpoints, identity)


def newest_whole(folder: Path, identity: str) -> Path | None:
    """The newest checkpoint in `folder` that is whole and of this fit, or None. Half-written ones
    and another fit's are removed."""
    checkpoints = sorted(
        folder.glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    whole = [path for path in checkpoints if _is_whole(path, identity)]
    for path in set(checkpoints) - set(whole):
        log.warning("fit: %s is half-written or of another fit; it is not used", path.name)
        shutil.rmtree(path)
    return whole[0] if whole else None


def _is_whole(checkpoint: Path, identity: str) -> bool:
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        return seal["identity"] == identity and all(
            hash_file(checkpoint / name) == value for name, value in seal["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


class SealedCheckpoints(TrainerCallback):
    """Seals each checkpoint when all of its files are on disk. Added after every callback that
    writes into a checkpoint."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False  # the adapter itself is saved next

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process has written its generator's state
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        for path in files:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(checkpoint)
        hashes = {str(path.relative_to(checkpoint)): hash_file(path) for path in files}
        write_json(
            checkpoint / SEAL,
            {"identity": self.identity, "step": state.global_step, "files": hashes},
        )
