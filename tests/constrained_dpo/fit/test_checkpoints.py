"""Checkpoints inside a fit: whose they are, which are whole, and what a resumed fit is made of."""

import logging
import os
import resource

import pandas as pd
import pytest
import torch

from constrained_dpo.fit.checkpoints import SEAL, SealedCheckpoints, fit_identity, newest_whole
from constrained_dpo.fit.holdout import BEST_FILE
from constrained_dpo.fit.rows import pair_dataset
from data_prep.labels.preferences import label_pairs
from tests.helpers.fits import (
    LORA,
    built_trainer,
    fit_log,
    fit_settings,
    make_pairs,
    make_pool,
    prompt_tokens,
)
from tests.helpers.moments import interrupt, when

# Several epochs, the last of them cut short.
LONG = {
    "steps": 12,
    "gradient_accumulation": 2,
    "learning_rate": 2e-3,
    "save_steps": 3,
    "holdout": 0.25,
    "early_stop": 50,
    "eval_steps": 2,
}
DROPOUT = LORA.model_copy(update={"dropout": 0.05})


def weights(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def whole(folder) -> list[int]:
    """The steps of the checkpoints that are sealed."""
    seals = folder.glob(f"checkpoint-*/{SEAL}")
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in seals)


def without_times(log: dict) -> list[dict]:
    """The log of every step; its last row is about the process that ended the fit."""
    clock = ("_runtime", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(clock)} for row in log["log"][:-1]]


def truncate(checkpoint) -> None:
    os.truncate(checkpoint / "optimizer.pt", 1000)


def lose_the_seal(checkpoint) -> None:
    (checkpoint / SEAL).unlink()


def test_an_interrupted_fit_equals_one_never_interrupted(plain_policy, pool, tmp_path, caplog):
    """To the last bit, with accumulation, dropout, epochs and an early stop's best adapter. A
    checkpoint that is half-written, or was damaged since, gives way to the one before it."""
    caplog.set_level(logging.INFO, "constrained_dpo")
    folder, checkpoints = tmp_path / "interrupted", tmp_path / "interrupted" / "checkpoints"
    fit = lambda: fit_log(plain_policy, pool, folder, lora=DROPOUT, checkpoints=checkpoints, **LONG)
    start, state = [], {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for least, damage in ((6, truncate), (9, lose_the_seal)):
        caplog.clear()
        reached = lambda least=least: max(whole(checkpoints), default=0) >= least
        with pytest.raises(KeyboardInterrupt), when(reached, interrupt):
            fit()
        assert goes_on_from(caplog) == start
        *earlier, newest = whole(checkpoints)
        checkpoint, start = checkpoints / f"checkpoint-{newest}", earlier[-1:]
        files = {path.name for path in checkpoint.iterdir()}
        assert files >= state | {BEST_FILE, "adapter_model.safetensors"}
        assert not any(name.startswith("model") for name in files), "it must not copy the base"
        damage(checkpoint)
        unused = f"fit: {checkpoint.name} is half-written or of another fit; it is not used"
    caplog.clear()
    log = fit()
    assert goes_on_from(caplog) == start and unused in caplog.messages
    assert not checkpoints.exists()  # gone with the fit that was committed

    uninterrupted = fit_log(plain_policy, pool, tmp_path / "whole", lora=DROPOUT, **LONG)
    assert weights(folder) == weights(tmp_path / "whole")
    assert without_times(log) == without_times(uninterrupted)
    assert log["held_out"] == uninterrupted["held_out"] and without_times(log)[-1]["epoch"] > 2


def goes_on_from(caplog) -> list[int]:
    """The step of the checkpoint that a fit was resumed from."""
    lines = [line for line in caplog.messages if "goes on from" in line]
    return [int(line.rpartition("checkpoint-")[2]) for line in lines]


@pytest.fixture(scope="module")
def other_pairs(pool):
    """The same pairs at another λ."""
    lambda_ = pd.Series({"harmless": 0.6})
    return label_pairs(pool, "helpful", lambda_, labels="soft", pairs_per_prompt=6, seed=0)


@pytest.fixture(scope="module")
def identity(plain_policy, pool):
    """The identity of a fit on labels, with what is changed."""

    def of(labels, **changes) -> str:
        rows = pair_dataset(labels, pool, prompt_tokens(plain_policy), 16)
        fixed = {"beta": 0.25, "seeds": (0, 0), "previous_adapter": None}
        settings = fit_settings(save_steps=3)
        return fit_identity(rows, plain_policy.fingerprint, settings, LORA, **fixed | changes)

    return of


@pytest.fixture(scope="module")
def alone(plain_policy, pool, tmp_path_factory):
    """A fit that found no checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    fit_log(plain_policy, pool, folder, checkpoints=folder / "checkpoints", save_steps=3)
    return folder


def test_whatever_a_fit_depends_on_is_in_its_identity(
    identity, pool, other_pairs, alone, monkeypatch
):
    pairs = make_pairs(pool)
    ours = identity(pairs)
    assert ours == identity(make_pairs(pool))
    others = [
        identity(other_pairs),
        identity(pairs, seeds=(1, 0)),
        identity(pairs, beta=0.3),
        identity(pairs, previous_adapter=alone / "adapter"),
    ]
    # The same rows, others of them in a step.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    others.append(identity(pairs))
    assert len({ours, *others}) == 6


def test_a_checkpoint_of_another_fit_is_never_resumed(
    plain_policy, pool, other_pairs, identity, alone, tmp_path, caplog
):
    """Whole checkpoints lie where the fit looks for them; they are of the same fit at another λ."""
    caplog.set_level(logging.INFO, "constrained_dpo")
    checkpoints, other = tmp_path / "checkpoints", identity(other_pairs)
    rows = pair_dataset(other_pairs, pool, prompt_tokens(plain_policy), 16)
    with built_trainer(plain_policy, rows, checkpoints, save_steps=3) as trainer:
        trainer.add_callback(SealedCheckpoints(other))
        trainer.train()
    assert newest_whole(checkpoints, other) == checkpoints / "checkpoint-6"
    fit_log(plain_policy, pool, tmp_path, checkpoints=checkpoints, save_steps=3)
    assert weights(tmp_path) == weights(alone)
    assert caplog.text.count("of another fit; it is not used") == 2
    assert "goes on" not in caplog.text and not checkpoints.exists()


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(plain_policy, pool, tmp_path):
    """A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    message = r"checkpoints: the checkpoint cannot be saved \(.*File too large"
    try:
        with pytest.raises(OSError, match=message):
            fit_log(
                plain_policy, pool, tmp_path, checkpoints=tmp_path / "checkpoints", save_steps=3
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_whole(tmp_path / "checkpoints", "any") is None
    assert not (tmp_path / "adapter").exists()


def test_a_resumed_fit_has_one_adapter_in_float32_and_keeps_the_anchor(quickstart_policy, tmp_path):
    """Invariants 1 and 9 after a resume, on NF4: the first loss after it is the uninterrupted
    fit's, whose log-ratios are to the base."""
    policy, pool = quickstart_policy, make_pool(quickstart_policy)
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(policy), 16)
    settings = {"steps": 9, "save_steps": 6, "learning_rate": 5e-3}
    losses = []
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        resumed = checkpoint is not None
        with built_trainer(policy, rows, tmp_path, resumed=resumed, **settings) as trainer:
            trainer.add_callback(SealedCheckpoints("this fit"))
            trainer.train(resume_from_checkpoint=checkpoint)
            assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
            trained = [value for value in trainer.model.parameters() if value.requires_grad]
            states = trainer.optimizer.state.values()
            moments = [v for state in states for v in state.values() if torch.is_tensor(v)]
            assert trained and {value.dtype for value in trained + moments} == {torch.float32}
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 9 and losses[0] == losses[1]
    assert not (tmp_path / "checkpoint-9").exists()  # the last step's is the adapter itself
