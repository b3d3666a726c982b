"""Fits of pairs and of groups by as many processes as it is started with, then a command of `cdpo`; for `test_devices.py`.

accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml tests/launched_fits.py FOLDER BATCH_SIZE round RUN
"""

import sys
from pathlib import Path

import pandas as pd
from test_fit import LORA, fit_settings, make_pairs, make_pool, prompt_tokens

from constrained_dpo.cli import main
from constrained_dpo.devices import join_launch
from constrained_dpo.fit import fit_adapter
from data_prep.policy import PolicySettings, load_policy
from data_prep.preferences import label_groups

# Quantization, settings, and the fit that it starts from.
FITS = {
    "pairs": ("nf4", {}, None),
    "pairs-warm": ("nf4", {}, "pairs"),
    "groups": ("nf4", {"group_size": 4}, None),
    "listwise": ("none", {"group_size": 4, "loss": "listwise", "gradient_accumulation": 2, "gradient_checkpointing": True}, None),
}


def play(folder: Path, batch_size: int) -> None:
    """An adapter per fit under `folder`, each of 6 steps at a constant learning rate of 5e-3."""
    policies = {kind: load_policy(PolicySettings(model="quickstart", quantization=kind, dtype="float32")) for kind in ("nf4", "none")}
    for name, (quantization, changes, start) in FITS.items():
        policy = policies[quantization]
        pool = make_pool(policy)
        settings = fit_settings(steps=6, batch_size=batch_size, learning_rate=5e-3, lr_scheduler="constant", **changes)
        if settings.grouped:
            lambda_ = pd.Series({"harmless": 0.5})
            labels = label_groups(pool, "helpful", lambda_, group_size=4, groups_per_prompt=6, seed=0, round_number=0)
        else:
            labels = make_pairs(pool)
        fit_adapter(
            policy, labels, pool, prompt_tokens(policy), settings, LORA, beta=0.25, seed=3, output=folder / name,
            previous_adapter=folder / start if start else None,
        )  # fmt: skip


if __name__ == "__main__":
    join_launch()
    play(Path(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    main()
