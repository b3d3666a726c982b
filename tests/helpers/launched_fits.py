"""Fits of pairs and of groups by as many processes as it is started with, then a command of `cdpo`;
for `test_launch.py`.

accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml tests/helpers/launched_fits.py \
    FOLDER BATCH_SIZE round RUN
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import yaml

from constrained_dpo.cli.main import main
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.trainer import FitPlan
from constrained_dpo.launch import join_launch, num_processes
from data_prep.labels.groups import label_groups
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from tests.helpers.fits import LORA, fit_settings, make_pairs, make_pool, prompt_tokens
from tests.helpers.paths import RECIPES

# Quantization, settings, and the fit that it starts from.
FITS = {
    "pairs": ("nf4", {}, None),
    "pairs-warm": ("nf4", {}, "pairs"),
    "groups": ("nf4", {"group_size": 4}, None),
    "listwise": (
        "none",
        {
            "group_size": 4,
            "loss": "listwise",
            "gradient_accumulation": 2,
            "gradient_checkpointing": True,
        },
        None,
    ),
    "sharded": ("none", {}, None),
    "sharded-warm": ("none", {"gradient_checkpointing": True}, "sharded"),
}


@contextmanager
def fsdp() -> Iterator[None]:
    """fsdp.yaml's settings as the launcher hands them over, with accelerate's gate opened: it turns
    FSDP on for GPUs only, though torch, TRL and PEFT shard on CPUs as well."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    file = RECIPES / "accelerate" / "fsdp.yaml"
    config = yaml.safe_load(file.read_text())["fsdp_config"]
    begin = AcceleratorState.__init__

    def opened(self, *args, fsdp_plugin=None, **more):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )

    settings = {key.upper(): str(value) for key, value in config.items()} | {
        "ACCELERATE_USE_FSDP": "true"
    }
    with patch.dict(os.environ, settings), patch.object(AcceleratorState, "__init__", opened):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def play(folder: Path, batch_size: int) -> None:
    """An adapter per fit under `folder`, each of 6 steps at a constant rate of 5e-3. `sharded` ones
    run under FSDP in a launch."""
    for name, (quantization, changes, start) in FITS.items():
        policy = load_policy(
            PolicySettings(model="quickstart", quantization=quantization, dtype="float32")
        )
        pool = make_pool(policy)
        settings = fit_settings(
            steps=6, batch_size=batch_size, learning_rate=5e-3, lr_scheduler="constant", **changes
        )
        if settings.grouped:
            lambda_ = pd.Series({"harmless": 0.5})
            labels = label_groups(
                pool, "helpful", lambda_, group_size=4, groups_per_prompt=6, seed=0, round_number=0
            )
        else:
            labels = make_pairs(pool)
        plan = FitPlan(
            settings,
            LORA,
            beta=0.25,
            seed=3,
            output=folder / name,
            previous_adapter=folder / start if start else None,
        )
        with fsdp() if name.startswith("sharded") and num_processes() > 1 else nullcontext():
            fit_adapter(policy, labels, pool, prompt_tokens(policy), plan)
            print(f"{name}: the base is made of {type(next(policy.model.parameters())).__name__}s")


if __name__ == "__main__":
    join_launch()
    play(Path(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    main()
