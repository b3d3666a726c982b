"""Checkpoints inside a fit: kill -9 in the middle of real fits, half-written and foreign
checkpoints, and what a resumed fit is made of."""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.kill_many import Server, alive, content, leftovers
from constrained_dpo.fit.adapter import fit_adapter
from constrained_dpo.fit.checkpoints import SEAL, SealedCheckpoints, fit_identity, newest_whole
from constrained_dpo.fit.holdout import BEST_FILE
from constrained_dpo.fit.rows import pair_dataset
from constrained_dpo.fit.trainer import FitPlan, build_trainer
from constrained_dpo.run.create import init_run
from constrained_dpo.run.directory import RunDirectory
from data_prep.labels.preferences import label_pairs
from data_prep.quickstart import build_policy
from tests.helpers.fits import LORA, fit_settings, make_pairs, make_pool, prompt_tokens
from tests.helpers.paths import QUICKSTART, SMALL

# Dropout 0.05 is the recipe's; the steps span several epochs.
LONG = (
    *SMALL,
    "fit.steps=40",
    "fit.later_rounds=0.5",
    "fit.save_steps=4",
    "fit.gradient_accumulation=2",
    "fit.batch_size=8",
    "fit.pairs_per_prompt=6",
    "fit.holdout=0.2",
    "fit.early_stop=50",
    "fit.eval_steps=7",
    "fit.learning_rate=2e-3",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def play(server: Server, run: RunDirectory, moment=lambda: False, delay: float = 0.0) -> str:
    """`cdpo run` in a process of its own, killed with its group `delay` seconds after `moment()` is
    true; returns what it said."""
    pid = server.start("run", run.path)
    while alive(pid):
        if moment():
            time.sleep(delay)
            if alive(pid):
                os.killpg(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    status = server.wait()
    assert status in (0, -signal.SIGKILL), server.log.read_text()
    return server.log.read_text() + ("killed" if status else "")


def checkpoints(run: RunDirectory, number: int) -> dict[int, bool]:
    """Step → whether it is sealed."""
    found = run.checkpoints_folder(number).glob("checkpoint-*")
    return {int(path.name.rpartition("-")[2]): (path / SEAL).exists() for path in sorted(found)}


def logged(run: RunDirectory, number: int) -> list[dict]:
    """The log of a fit without its times; its last row is about the process that ended it."""
    rows = json.loads((run.adapter_folder(number) / "training_log.json").read_text())["log"][:-1]
    return [
        {k: v for k, v in row.items() if not k.endswith(("_runtime", "_per_second"))}
        for row in rows
    ]


def newest(run: RunDirectory, number: int) -> int:
    return max((step for step, whole in checkpoints(run, number).items() if whole), default=0)


def lose_the_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 1000)


def test_fits_killed_many_times_equal_those_never_killed(server, tmp_path):
    """To the last bit: adapters, tables, λ, the log of every step; with accumulation, dropout,
    epochs, an early stop's best adapter.

    A checkpoint that a kill left half-written, or that was damaged since, gives way to the one
    before it.
    """
    model = f"policy.model={build_policy()}"
    expected, run = (
        init_run(QUICKSTART, tmp_path / name, [*LONG, model])
        for name in ("uninterrupted", "killed")
    )
    assert "goes on" not in play(server, expected)

    def half_written() -> bool:
        return newest(run, 0) >= 16 and False in checkpoints(run, 0).values()

    two_whole = lambda: list(checkpoints(run, 0).values()) == [True, True]
    # the round that is killed, when, how many seconds later, and what is done to its newest
    # checkpoint
    chain = [
        (0, two_whole, 0.0, truncate),
        (0, half_written, 0.0, None),
        (0, lambda: newest(run, 0) >= 24 and two_whole(), 0.0, lose_the_seal),
        (0, lambda: newest(run, 0) >= 32, 0.05, None),
        (1, lambda: newest(run, 1) >= 8, 0.02, None),
    ]
    wanted = 0
    for number, moment, delay, damage in [*chain, (1, lambda: False, 0.0, None)]:
        said = play(server, run, moment, delay)
        assert said.endswith("killed") == (moment in [link[1] for link in chain])
        assert (
            (f"fit: goes on from checkpoint-{wanted}\n" in said)
            if wanted
            else ("goes on from" not in said)
        ), said
        steps = sorted(step for step, whole in checkpoints(run, number).items() if whole)
        if damage:
            damage(run.checkpoints_folder(number) / f"checkpoint-{steps.pop()}")
        wanted = steps[-1] if steps else 0
        if damage is truncate and wanted:
            files = {
                path.name for path in (run.checkpoints_folder(0) / f"checkpoint-{wanted}").iterdir()
            }
            assert {
                "adapter_model.safetensors",
                "optimizer.pt",
                "scheduler.pt",
                "rng_state.pth",
                "trainer_state.json",
                BEST_FILE,
            } <= files
            assert not any(name.startswith("model") for name in files), (
                "a checkpoint must not copy the base"
            )
    found, results = content(run), content(expected)
    assert [
        name for name in found.keys() | results.keys() if found.get(name) != results.get(name)
    ] == []
    assert [max(row["step"] for row in logged(run, number)) for number in range(2)] == [40, 20]
    assert (
        all(logged(run, number) == logged(expected, number) for number in range(2))
        and logged(run, 0)[-1]["epoch"] > 2
    )
    assert leftovers(run) == []


def test_a_checkpoint_of_another_fit_is_never_resumed(
    quickstart_policy, tmp_path, capsys, monkeypatch
):
    """Whole checkpoints lie where the fit looks for them; they are of the same fit at another λ."""
    policy, pool = quickstart_policy, make_pool(quickstart_policy)
    tokens, settings = prompt_tokens(policy), fit_settings(save_steps=3)
    other = label_pairs(
        pool, "helpful", pd.Series({"harmless": 0.6}), labels="soft", pairs_per_prompt=6, seed=0
    )

    def fit(name: str) -> bytes:
        fit_adapter(
            policy,
            make_pairs(pool),
            pool,
            tokens,
            FitPlan(
                settings,
                LORA,
                beta=0.25,
                seed=0,
                output=tmp_path / name / "adapter",
                checkpoints=tmp_path / name / "checkpoints",
            ),
        )
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    identity = lambda labels, **changes: fit_identity(
        pair_dataset(labels, pool, tokens, 16),
        policy.fingerprint,
        settings,
        LORA,
        **{"beta": 0.25, "seeds": (0, 0), "previous_adapter": None} | changes,
    )
    ours = identity(make_pairs(pool))
    assert ours == identity(make_pairs(pool))
    expected = fit("alone")
    others = [
        identity(other),
        identity(make_pairs(pool), seeds=(1, 0)),
        identity(make_pairs(pool), beta=0.3),
    ]
    others.append(identity(make_pairs(pool), previous_adapter=tmp_path / "alone" / "adapter"))
    (
        monkeypatch.setenv("LOCAL_RANK", "0"),
        monkeypatch.setenv("WORLD_SIZE", "2"),
    )  # the same rows, others of them in a step
    others.append(identity(make_pairs(pool)))
    monkeypatch.undo()
    assert len({ours, *others}) == 6

    rows, folder = pair_dataset(other, pool, tokens, 16), tmp_path / "other" / "checkpoints"
    trainer = build_trainer(policy, rows, FitPlan(settings, LORA, beta=0.25, seed=0, output=folder))
    trainer.add_callback(SealedCheckpoints(identity(other)))
    trainer.train()
    trainer.model.unload()
    policy.model.__dict__.pop("forward", None)
    assert newest_whole(folder, identity(other)) == folder / "checkpoint-6"
    assert fit("other") == expected
    said = capsys.readouterr().err
    assert said.count("of another fit; it is not used") == 2 and "goes on" not in said
    assert not folder.exists()  # gone with the fit that was committed


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(quickstart_policy, tmp_path):
    """A limit on the size of files stands for the full disk."""
    pool = make_pool(quickstart_policy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"checkpoints: the checkpoint cannot be saved \(.*File too large"
        ):
            fit_adapter(
                quickstart_policy,
                make_pairs(pool),
                pool,
                prompt_tokens(quickstart_policy),
                FitPlan(
                    fit_settings(save_steps=3),
                    LORA,
                    beta=0.25,
                    seed=0,
                    output=tmp_path / "adapter",
                    checkpoints=tmp_path / "checkpoints",
                ),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (
        newest_whole(tmp_path / "checkpoints", "any") is None
        and not (tmp_path / "adapter").exists()
    )


def test_a_resumed_fit_has_one_adapter_in_float32_and_keeps_the_anchor(quickstart_policy, tmp_path):
    """Invariants 1 and 9 after a resume, on NF4: the first loss after it is the uninterrupted
    fit's, whose log-ratios are to the base."""
    policy, pool = quickstart_policy, make_pool(quickstart_policy)
    rows = pair_dataset(make_pairs(pool), pool, prompt_tokens(policy), 16)
    settings = fit_settings(steps=9, save_steps=6, learning_rate=5e-3)
    losses = []
    for resumed in (None, tmp_path / "checkpoint-6"):
        trainer = build_trainer(
            policy,
            rows,
            FitPlan(settings, LORA, beta=0.25, seed=0, output=tmp_path),
            resumed=resumed is not None,
        )
        trainer.add_callback(SealedCheckpoints("this fit"))
        try:
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
            trained = [value for value in trainer.model.parameters() if value.requires_grad]
            assert trained and all(value.dtype == torch.float32 for value in trained)
            assert all(
                v.dtype == torch.float32
                for s in trainer.optimizer.state.values()
                for v in s.values()
                if torch.is_tensor(v)
            )
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        finally:
            trainer.model.unload()
            policy.model.__dict__.pop("forward", None)
    assert len(losses[0]) == 9 and losses[0] == losses[1]
    assert not (tmp_path / "checkpoint-9").exists()  # the last step's is the adapter itself
