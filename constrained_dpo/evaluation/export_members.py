"""`cdpo export --margin`: members of a run's family to take away, each an ordinary adapter that was
sampled afresh and judged, and one model card for all of them."""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from constrained_dpo.evaluation.export import (
    GENERATION_CONFIG,
    new_folder,
    publish,
    require_free,
    write_generation_config,
)
from constrained_dpo.evaluation.front_record import FrontPoint, Setting
from constrained_dpo.evaluation.front_source import KEPT_ADAPTER, FrontOptions, FrontSource
from constrained_dpo.evaluation.model_card import members_card
from constrained_dpo.fit.family import write_member
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.models.checkpoints import ADAPTER_CONFIG

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


@dataclass(frozen=True)
class Member:
    """An exported adapter.

    name: on a server; folder: where it is; point: what was measured of it.
    """

    name: str
    folder: Path
    point: FrontPoint

    def notices(self) -> list[str]:
        """Say where the adapter is not what a reader would expect of its setting."""
        point, lines = self.point, []
        for name, end in point.at_edge.items():
            u, words = point.test.u[name], "largest" if end == "high" else "smallest"
            lines.append(
                f"{self.name}: the margin of {name} is met at no λ in range; this is the member at "
                f"the {words} one, λ({name}) = {point.lambda_[name]:.4g}, where u = {u:+.3f} "
                f"({point.test.verdicts[name]})"
            )
        outside = [f"λ({name})" for name in point.outside] + ["κ"] * bool(point.kappa_outside)
        if outside:
            lines.append(
                f"{self.name}: {' and '.join(outside)} lies outside the range that the family was "
                "trained on; rely on the measurement"
            )
        return lines


def export_members(
    run: RunDirectory,
    recipe: Recipe,
    points: Sequence[FrontPoint],
    varied: Sequence[str],
    output: Path,
) -> list[Member]:
    """Write the adapters of points of the run's front: one into `output`, several into folders of
    it, with their measurements and a model card.

    varied: the constraints that the adapters are named after. Raises UserError when `output` holds
    something already, or where two adapters would have one name.
    """
    require_free(output)
    names = [point.setting.name(list(varied)) for point in points]
    if len(set(names)) < len(names):
        raise UserError(f"{output}: two adapters would have the name {_twice(names)}; export apart")
    folders = [output] if len(points) == 1 else [output / name for name in names]
    members = [Member(*columns) for columns in zip(names, folders, points, strict=True)]
    source = FrontSource(run, recipe, points[0].round, FrontOptions())
    temporary = new_folder(output)
    for member in members:
        folder = temporary / member.folder.relative_to(output)
        lambda_ = recipe.problem.multipliers(member.point.lambda_)
        if not source.distilled:
            write_member(source.family, lambda_, member.point.kappa, folder)
        elif (kept := run.front_folder(member.point.key) / KEPT_ADAPTER).exists():
            shutil.copytree(kept, folder, dirs_exist_ok=True)  # the very one that was measured
        else:
            raise UserError(f"{kept}: is gone; remove {kept.parent}, and the point is played again")
        write_json(folder / "measurement.json", member.point.to_json())
        write_generation_config(folder, recipe)
    line = serve_line(members, output, temporary)
    notices = [notice for member in members for notice in member.notices()]
    card = members_card(run, recipe, [(m.name, m.point) for m in members], line, notices)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    publish(temporary, output)
    return members


def serve_line(members: Sequence[Member], output: Path, written: Path | None = None) -> str:
    """Give the vLLM command that serves the base with these adapters, at their temperature where a
    request names none.

    written: where the adapters lie until they are published at `output`.
    """
    first = (written or output) / members[0].folder.relative_to(output)
    config = json.loads((first / ADAPTER_CONFIG).read_text())
    rank = served_rank(int(config["r"]))
    modules = " ".join(shlex.quote(f"{member.name}={member.folder}") for member in members)
    base = shlex.quote(str(config["base_model_name_or_path"]))
    # a slot more than adapters: with all taken, vLLM 0.32 mixes them into the base's answers
    slots = f"--max-loras {len(members) + 1} --max-lora-rank {rank}"
    line = f"vllm serve {base} --enable-lora {slots} --lora-modules {modules}"
    if not (first / GENERATION_CONFIG).exists():
        return line
    law = json.loads((first / GENERATION_CONFIG).read_text(encoding="utf-8"))
    chosen = shlex.quote(json.dumps({"temperature": law["temperature"]}))
    return f"{line} --override-generation-config {chosen}"


def served_rank(rank: int) -> int:
    """Give the smallest --max-lora-rank of vLLM that holds an adapter of this rank; the rank itself
    where there is none."""
    return next((allowed for allowed in SERVED_RANKS if allowed >= rank), rank)


def varied_constraints(recipe: Recipe, settings: Sequence[Setting]) -> list[str]:
    """Name the constraints by which settings differ from each other, or else from the recipe's; of
    settings that differ by nothing, all."""
    names = recipe.problem.names
    values = [setting.margins or setting.lambda_ or {} for setting in settings]
    differ = [name for name in names if len({value.get(name) for value in values}) > 1]
    if not differ and settings[0].margins is not None:
        levels = recipe.problem.bounds
        differ = [name for name in names if values[0].get(name) != levels[name]]
    return differ or names


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
