"""The conditional policy π(y|x; λ): one LoRA for every multiplier, and its ordinary members.

log π*_λ/π_ref = κ (r + λ·g)/β − log Z is an exponential family. The adapter has the same shape: its
rank is cut into blocks, one for the reward and one for each utility, and a gate stands between the
two matrices (docs/method.md, The conditional policy):

    ΔW(c) x = scale · B · diag(c, each repeated over its block) · A x ,   c = κ (1, λ_1/ν_1, …)

with ν the multipliers of the first round, so that every block learns at the same pace whatever the
scores' scale. Constraints by category share the block of their utility: a prompt's gate is the sum
of the λ of its categories, over ν. Such a member is another adapter for each category, and one for
all is distilled from it (`distill.py`). Files only: neither torch nor PEFT.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from constrained_dpo.problem import Constraint, by_name
from data_prep.errors import UserError
from data_prep.files import sync_folder
from data_prep.labels.multipliers import MultiplierRange, multiplier_columns
from data_prep.models.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from data_prep.records import Record

FAMILY_FILE, FAMILY_WEIGHTS = "family.json", "family.safetensors"
"""Neither has a name that PEFT would load: weights without their gate are no policy."""


class Family(Record):
    """What a gated adapter is. units: ν by block, in their order; rank: of one block; low, high:
    the multipliers that it was trained on, by constraint; kappa: the range of κ = β_recipe/β that
    it was trained on, None for κ = 1 alone; shared: the block that serves a constraint, where it is
    not one of its own name."""

    units: dict[str, float]
    rank: int
    low: dict[str, float]
    high: dict[str, float]
    kappa: tuple[float, float] | None = None
    shared: dict[str, str] = Field({})

    @property
    def names(self) -> list[str]:
        """The constraints."""
        return list(self.low)

    @property
    def num_blocks(self) -> int:
        """One of the reward and one of each utility."""
        return 1 + len(self.units)

    def gates(self, lambda_: pd.DataFrame, kappa: np.ndarray | float = 1.0) -> np.ndarray:
        """Compute c for rows of multipliers (columns by constraint, null where it does not concern
        the row's prompt): (num_rows, 1 + blocks). Raises ValueError for a null λ of a constraint
        that has a block alone."""
        alone = [name for name in self.names if name not in self.shared]
        if lambda_[alone].isna().any(axis=None):
            raise ValueError(f"a multiplier of {', '.join(alone)} is null")
        by_block = lambda_[self.names].rename(columns=self.shared).T.groupby(level=0).sum().T
        ratios = [by_block[block].to_numpy(np.float64) / nu for block, nu in self.units.items()]
        gates = np.stack([np.ones(len(lambda_)), *ratios], axis=1)
        return np.asarray(gates * np.broadcast_to(kappa, (len(lambda_),))[:, None])


def family_for(
    constraints: Sequence[Constraint], units: pd.Series, law: MultiplierRange, rank: int
) -> Family:
    """Describe the family that rows under `law` fit, with blocks of `rank`.

    units: by constraint, > 0; a block of several has their mean.
    """
    blocks = pd.Series({c.name: c.block for c in constraints}, dtype=object)
    return Family(
        units={
            str(block): float(units[blocks.index[blocks == block]].mean())
            for block in blocks.unique()
        },
        rank=rank,
        low=by_name(law.low),
        high=by_name(law.high),
        kappa=law.kappa,
        shared={str(name): block for name, block in blocks.items() if name != block},
    )


class SealedFamily(Record):
    """family.json: the family, and PEFT's config of its weights, which a member's is too."""

    family: Family
    adapter_config: dict[str, Any]


def is_family(folder: Path) -> bool:
    """Tell whether a folder holds a gated adapter."""
    return (folder / FAMILY_FILE).exists()


def read_family(folder: Path) -> Family:
    """Read what the gated adapter of a folder is.

    Raises UserError where there is none, or its file is damaged.
    """
    return _sealed(folder).family


def _sealed(folder: Path) -> SealedFamily:
    if not is_family(folder):
        raise UserError(f"{folder}: holds no family ({FAMILY_FILE}); give a round's family folder")
    return SealedFamily.read(folder / FAMILY_FILE)


def seal_family(folder: Path, family: Family) -> None:
    """Turn PEFT's files in a folder into a family's, which PEFT does not load."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    sealed = SealedFamily(family=family, adapter_config=config)
    (folder / FAMILY_FILE).write_text(json.dumps(sealed.to_json(), indent=1))
    (folder / ADAPTER_WEIGHTS).rename(folder / FAMILY_WEIGHTS)
    (folder / ADAPTER_CONFIG).unlink()


def write_member(folder: Path, lambda_: pd.Series, kappa: float, output: Path) -> None:
    """Write the family's member at λ and κ: an ordinary LoRA folder that appears whole.

    The gate goes into A: its rows are scaled by the gates of their blocks. lambda_: by constraint.
    Raises UserError where the folder holds no family, ValueError where constraints share a block:
    the gates are then other ones for each prompt.
    """
    if (family := read_family(folder)).shared:
        raise ValueError(f"{folder}: constraints by category share a block; distill the member")
    gates = family.gates(lambda_.to_frame().T, kappa)[0]
    write_adapter(folder, scaled_weights(folder, gates), output)


def scaled_weights(folder: Path, gates: np.ndarray) -> dict[str, np.ndarray]:
    """Read a family's weights with fixed gates, (blocks,), in its A matrices: by PEFT's names."""
    from safetensors.numpy import load_file

    scale = np.repeat(gates, read_family(folder).rank).astype(np.float32)[:, None]
    return {
        name: value * scale if ".lora_A." in name else value
        for name, value in load_file(folder / FAMILY_WEIGHTS).items()
    }


def write_adapter(folder: Path, weights: dict[str, np.ndarray], output: Path) -> None:
    """Write weights by PEFT's names, with the config of a family's, as an adapter folder that
    appears whole."""
    from safetensors.numpy import save_file

    sealed = _sealed(folder)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (temporary / ADAPTER_CONFIG).write_text(json.dumps(sealed.adapter_config, indent=2))
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        with open(temporary / name, "rb") as handle:
            os.fsync(handle.fileno())
    os.replace(temporary, output)
    sync_folder(output.parent)


def family_columns(labels: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Take each label row's multipliers out of a labels table: columns by constraint."""
    names = list(names)
    return labels[multiplier_columns(names)].set_axis(names, axis=1)
