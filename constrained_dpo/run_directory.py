"""Every path of a run, its state, its lock. A phase is done if and only if its file exists; files appear whole or not at all."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.recipe import Recipe, load_recipe
from data_prep.settings import UserError
from data_prep.tables import read_parquet, write_atomically, write_json

VERSION = 1


@dataclass(frozen=True)
class RunDirectory:
    """runs/NAME: recipe.yaml, state.json, prompts.parquet, pool/, reference.parquet, exact.json, rounds/NNN/, scores.sqlite."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def prompts_file(self) -> Path:
        return self.path / "prompts.parquet"

    @property
    def reference_file(self) -> Path:
        """π_ref's responses on dual and test prompts, scored, with their split."""
        return self.path / "reference.parquet"

    @property
    def exact_file(self) -> Path:
        """The exact optimum, where the world can be enumerated."""
        return self.path / "exact.json"

    @property
    def score_cache(self) -> Path:
        return self.path / "scores.sqlite"

    def pool_file(self, round_number: int | None) -> Path:
        """The pool's part from π_ref (None) or from a round."""
        return self.path / "pool" / ("reference.parquet" if round_number is None else f"round-{round_number:03d}.parquet")

    def round_folder(self, round_number: int) -> Path:
        return self.path / "rounds" / f"{round_number:03d}"

    def pairs_file(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "pairs.parquet"

    def adapter_folder(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "adapter"

    def samples_file(self, round_number: int) -> Path:
        """π_θ's responses on dual and test prompts, scored, with their split."""
        return self.round_folder(round_number) / "samples.parquet"

    def round_file(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "round.json"

    def shard_folder(self, phase: str) -> Path:
        """Committed shards of a phase still under way."""
        return self.path / "shards" / phase

    def recipe(self) -> Recipe:
        """The frozen recipe; raises UserError when it was edited after init."""
        self._require()
        recipe = load_recipe(self.recipe_file)
        if recipe.hash() != self.state()["recipe_hash"]:
            raise UserError(f"{self.recipe_file}: was changed after init; restore it, or start another run with `cdpo init`")
        return recipe

    def _require(self) -> None:
        if not self.state_file.exists():
            raise UserError(f"{self.path}: not a run directory (no state.json); create it with `cdpo init RECIPE {self.path}`")

    def state(self) -> dict:
        """state.json: version, recipe_hash, lambda (one dict per round begun), hashes of inputs, left_out counts."""
        self._require()
        try:
            state = json.loads(self.state_file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{self.state_file}:{error.lineno}: not valid JSON ({error.msg}); restore it from a backup") from error
        if state.get("version") != VERSION:
            raise UserError(
                f"{self.state_file}: version {state.get('version')}, this program reads {VERSION}; use the release that wrote it"
            )
        return state

    def write_state(self, state: dict) -> None:
        write_json(self.state_file, state)

    def prompts(self) -> pd.DataFrame:
        return read_parquet(self.prompts_file)

    def round_record(self, round_number: int) -> dict:
        return json.loads(self.round_file(round_number).read_text())

    def rounds_done(self) -> int:
        """Number of rounds whose dual step is in state.json."""
        return max(len(self.state()["lambda"]) - 1, 0)

    def pool(self, before_round: int) -> pd.DataFrame:
        """The scored responses a round's pairs are drawn from: π_ref's, and those of earlier rounds that grew it."""
        parts = [read_parquet(self.pool_file(None))]
        parts += [read_parquet(f) for t in range(before_round) if (f := self.pool_file(t)).exists()]
        return pd.concat(parts, ignore_index=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; the lock is the OS's, so it dies with its process. Sweeps what a killed one left half-done.

        Raises UserError when another process holds it or the folder cannot be written.
        """
        self._require()
        try:
            handle = open(self.path / ".lock", "a+")  # noqa: SIM115 (closed below, with the lock)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise UserError(f"{self.path}: is being worked on by {holder}; wait for it or stop it") from error
            for leftover in list(self.path.rglob(".*.tmp")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            with suppress(OSError):  # only a courtesy to whom the lock turns away: a full disk is reported by the first real write
                os.ftruncate(handle.fileno(), 0)
                os.write(handle.fileno(), f"process {os.getpid()}".encode())
            yield


def init_run(recipe_file: Path, path: Path, overrides: list[str]) -> RunDirectory:
    """Freezes a recipe into a new run directory; the same recipe again is no error. Raises UserError if another recipe's run is there."""
    recipe = load_recipe(recipe_file, overrides)
    run = RunDirectory(Path(path))
    asked = recipe.model_dump(mode="json")["dual"]["step_scale"]
    if run.state_file.exists():
        state = run.state()
        if state["recipe_hash"] != recipe.hash() or state["asked_step_scale"] != asked:
            raise UserError(f"{path}: is a run of another recipe (or other -s settings); choose another run directory")
        return run
    if run.path.exists() and any(run.path.iterdir()) and not run.recipe_file.exists():
        raise UserError(f"{path}: exists and is not a run directory; choose an empty or new folder")
    try:
        write_atomically(run.recipe_file, recipe.to_yaml().encode())
        run.write_state(
            {"version": VERSION, "recipe_hash": recipe.hash(), "asked_step_scale": asked, "lambda": [], "hashes": {}, "left_out": {}}
        )
    except OSError as error:
        raise _unwritable(run.path, error) from error
    return run


def _unwritable(path: Path, error: OSError) -> Exception:
    """A folder that cannot be written is the user's choice (exit 2), a disk that is full is not (exit 1)."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(f"{path}: cannot be written ({error.strerror}); choose a writable run directory")
