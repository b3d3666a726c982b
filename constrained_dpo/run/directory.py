"""Every path of a run, its state, its lock. A phase is done if and only if its file exists; files
appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from constrained_dpo.progress import reporting
from constrained_dpo.recipe.defaults import sized, split_counts
from constrained_dpo.recipe.load import load_recipe, read_document, recipe_text
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.files import hold, read_json, write_atomically, write_json
from data_prep.readers.tables import read_parquet
from data_prep.records import Record

VERSION = 1


MORE_FITS = 2
"""Further fits of a round whose family does not answer λ yet."""


class RunState(Record):
    """state.json: how far a run is, and what its numbers depend on.

    lambda_: the multipliers of every round begun, one dict per round; tail_points: the points of
    its tails, likewise; asked_step_scale:
    dual.step_scale before `prepare` made numbers of it; hashes: of policy, scorers, sampling law
    and prompts; left_out: prompts by reason; inherited: the run whose samples were taken over.
    """

    version: int = VERSION
    recipe_hash: str
    asked_step_scale: str | dict[str, float]
    lambda_: list[dict[str, float]] = Field(alias="lambda")
    tail_points: list[dict[str, float]] = Field(default_factory=list)
    hashes: dict[str, Any]
    left_out: dict[str, int]
    inherited: dict[str, str] | None = None

    def tail_points_of(self, number: int) -> dict[str, float]:
        """Give the points of a round's tails (-1: of the next one); none where a run has none."""
        return self.tail_points[number] if self.tail_points else {}

    @property
    def prepared(self) -> bool:
        return bool(self.lambda_)

    @property
    def rounds_done(self) -> int:
        return max(len(self.lambda_) - 1, 0)


@lru_cache(maxsize=8)
def _parsed(file: Path, content: bytes) -> Recipe:
    """Reads a recipe once for each content: a round asks for it many times."""
    return load_recipe(file)


@dataclass(frozen=True)
class RunDirectory:
    """runs/NAME: recipe.yaml, state.json, prompts, pool/, reference.parquet, scorers.json,
    exact.json, rounds/NNN/, scores.sqlite, logs."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # a plain string is welcome

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
    def scorers_file(self) -> Path:
        """What is known of every scorer: its options, its scores' statistics on π_ref's pool, how
        far quantization moves them, what an implicit one's are worth."""
        return self.path / "scorers.json"

    def inherited_file(self, phase: str) -> Path:
        """π_ref's responses taken over from another run (`init --from`), without scores; phase is
        pool, dataset or reference."""
        return self.path / "inherited" / f"{phase}.parquet"

    @property
    def score_cache(self) -> Path:
        return self.path / "scores.sqlite"

    def pool_file(self, round_number: int | None) -> Path:
        """The pool's part from π_ref (None) or from a round."""
        return (
            self.path
            / "pool"
            / ("reference.parquet" if round_number is None else f"round-{round_number:03d}.parquet")
        )

    @property
    def dataset_pool_file(self) -> Path:
        """The pool's part from the prompts' dataset, scored; without the law they were drawn from,
        so for fits alone."""
        return self.path / "pool" / "dataset.parquet"

    @property
    def given_pairs_file(self) -> Path:
        """The dataset's own labels (`fit.labels: given`): chosen and rejected responses of its part
        of the pool."""
        return self.path / "pool" / "given.parquet"

    @property
    def dataset_record_file(self) -> Path:
        """How many of the dataset's responses are in the pool, and what was left out."""
        return self.path / "pool" / "dataset.json"

    def round_folder(self, round_number: int) -> Path:
        return self.path / "rounds" / f"{round_number:03d}"

    def pairs_file(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "pairs.parquet"

    def groups_file(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "groups.parquet"

    def labels_file(self, round_number: int, grouped: bool, stretch: int = 0) -> Path:
        """What a stretch of a round's fit reads beside the pool: its groups, or its pairs."""
        whole = self.groups_file(round_number) if grouped else self.pairs_file(round_number)
        return whole.with_stem(f"{whole.stem}-{stretch}") if stretch else whole

    def refresh_folder(self, round_number: int, stretch: int) -> Path:
        """What a stretch of a fit leaves for the next one: its policy and its checkpoint."""
        return self.round_folder(round_number) / ".refresh" / str(stretch)

    def refresh_file(self, round_number: int, stretch: int) -> Path:
        """The pool's part that was sampled after a stretch of a fit."""
        return self.path / "pool" / f"round-{round_number:03d}-refresh-{stretch}.parquet"

    def family_folder(self, round_number: int, attempt: int = 0) -> Path:
        """A round's gated adapter; attempt: fits that went before because λ moved nothing."""
        name = f"family-{attempt}" if attempt else "family"
        return self.round_folder(round_number) / name

    def trials_folder(self, round_number: int, attempt: int = 0) -> Path:
        """Scored samples of the members that were tried."""
        name = f"trials-{attempt}" if attempt else "trials"
        return self.round_folder(round_number) / name

    def adapter_folder(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "adapter"

    def checkpoints_folder(self, round_number: int) -> Path:
        """Checkpoints of a round's fit while it is under way (`fit.save_steps`)."""
        return self.round_folder(round_number) / ".checkpoints"

    def samples_file(self, round_number: int) -> Path:
        """π_θ's responses on dual and test prompts, scored, with their split."""
        return self.round_folder(round_number) / "samples.parquet"

    def off_policy_file(self, round_number: int) -> Path:
        """π_θ's log-probabilities of π_ref's responses to the dual prompts."""
        return self.round_folder(round_number) / "off_policy.parquet"

    def round_file(self, round_number: int) -> Path:
        return self.round_folder(round_number) / "round.json"

    def evaluation_folder(self, key: str) -> Path:
        """samples.parquet, reference.parquet and evaluation.json of one `cdpo evaluate` or merged
        export."""
        return self.path / "evaluations" / key

    def gate_folder(self, key: str) -> Path:
        """gate.json and the responses of one `cdpo gate`, by set of prompts and side."""
        return self.path / "gates" / key

    def front_folder(self, key: str) -> Path:
        """trials/, samples.parquet and point.json of one point of a front."""
        return self.path / "front" / key

    @property
    def front_file(self) -> Path:
        """The points of the run's fronts, and the order in which they looked at the test
        prompts."""
        return self.path / "front" / "front.json"

    def shard_folder(self, phase: str) -> Path:
        """Committed shards of a phase still under way."""
        return self.path / "shards" / phase

    def logs_folder(self, name: str) -> Path:
        """What trackers wrote: `rounds`, or `round-NNN` for a round's fit."""
        return self.path / "logs" / name

    @property
    def progress_file(self) -> Path:
        """What the process that holds the run is doing, while it does."""
        return self.path / ".progress.json"

    def recipe(self) -> Recipe:
        """The frozen recipe, its tails at the run's last points; raises UserError when it was
        edited after init."""
        self._require()
        file = self.recipe_file
        recipe = _parsed(file, file.read_bytes() if file.is_file() else b"")
        state = self.state()
        if recipe.hash() != state.recipe_hash:
            raise UserError(
                f"{self.recipe_file}: was changed after init; restore it, or start another run "
                "with `cdpo init`"
            )
        recipe = recipe.at_tail_points(state.tail_points_of(-1))
        if not self.prompts_file.exists():
            return recipe
        return sized(recipe, split_counts(read_parquet(self.prompts_file, ["split"])))

    def write_recipe(self, recipe: Recipe) -> None:
        """Write what was measured, the step scale, the unit of margins and the categories, into
        recipe.yaml; the user's comments stay, and so does what the recipe leaves open."""
        measured = recipe.objective.constraints
        stored = load_recipe(self.recipe_file)
        stored = stored.with_reference_stds({c.name: c.reference_std for c in measured})
        stored = stored.with_categories({c.name: c.categories for c in measured})
        dual = stored.dual.model_copy(update={"step_scale": recipe.dual.step_scale})
        stored = stored.model_copy(update={"dual": dual})
        text = recipe_text(stored, read_document(self.recipe_file))
        write_atomically(self.recipe_file, text.encode())

    def _require(self) -> None:
        if self.path.is_file():
            raise UserError(
                f"{self.path}: is a file, not a run directory; create one with `cdpo init "
                f"{self.path} runs/NAME`"
            )
        if not self.state_file.exists():
            raise UserError(
                f"{self.path}: not a run directory (no state.json); create it with `cdpo init "
                f"RECIPE {self.path}`"
            )

    def state(self) -> RunState:
        """Read state.json. Raises UserError where it is damaged or of another version."""
        self._require()
        content = read_json(self.state_file)
        if content.get("version") != VERSION:
            raise UserError(
                f"{self.state_file}: version {content.get('version')}, this program reads "
                f"{VERSION}; use the release that wrote it"
            )
        return RunState.from_json(content, self.state_file)

    def write_state(self, state: RunState) -> None:
        """Replace state.json; the last thing that a phase does."""
        write_json(self.state_file, state.to_json())

    def prompts(self) -> pd.DataFrame:
        return read_parquet(self.prompts_file)

    def dataset_record(self) -> dict | None:
        """Counts of the dataset's responses in the pool, or None."""
        return read_json(self.dataset_record_file) if self.dataset_record_file.exists() else None

    def rounds_done(self) -> int:
        """Count the rounds whose dual step is in state.json."""
        return self.state().rounds_done

    def pool(self, recipe: Recipe, before_round: int, stretches: int = 0) -> pd.DataFrame:
        """The scored responses a round's labels are drawn from: π_ref's, the dataset's, those of
        earlier rounds that grew it, and those after so many stretches of its own fit."""
        source = recipe.pool.source
        parts = [] if source == "dataset" else [read_parquet(self.pool_file(None))]
        parts += [] if source == "reference" else [read_parquet(self.dataset_pool_file)]
        grown = [self.pool_file(t) for t in range(before_round)]
        grown += [self.refresh_file(before_round, k) for k in range(stretches)]
        parts += [read_parquet(file) for file in grown if file.exists()]
        return pd.concat(parts, ignore_index=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process; the lock is the OS's, so it dies with its process. Sweeps
        what a killed one left half-done.

        Raises UserError when another process holds it or the folder cannot be written.
        """
        self._require()
        with hold(self.path), reporting(self.progress_file):
            for checkpoints in list(self.path.glob("rounds/*/.checkpoints")):
                # Killed between the adapter and the end of its checkpoints.
                if (checkpoints.parent / "adapter").exists():
                    shutil.rmtree(checkpoints)
            yield
