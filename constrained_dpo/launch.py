"""The processes of one `accelerate launch`: how many, which one this is, where they wait for each
other, and which one may speak.

All of them play the same run and go on from what is on disk. A fit is shared, one batch per process
and step; shards of samples are divided; everything else (lock, tables, adapter, state, words) is
the main process's, and the others wait. A command that was not launched so is its own only process:
nothing is imported and nothing here does anything.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from constrained_dpo.environment import launch_words, waiting
from data_prep.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

    from data_prep.models.settings import PolicySettings


PATIENCE = timedelta(days=7)
"""How long a process waits for another. A phase of the main process alone can take hours; one that
died is noticed by the launcher."""


def num_processes() -> int:
    """Processes of the launch; 1 without one. From the environment that torchrun (so `accelerate
    launch`) gives its processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """This process's number, 0 to num_processes − 1."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def _state() -> "PartialState":
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Told nothing, accelerate takes a launch on a machine without a GPU for no launch at all.
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(),
        timeout=PATIENCE,
    )


def wait() -> None:
    """Returns when every process is here."""
    if num_processes() > 1:
        with waiting():
            _state().wait_for_everyone()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process passes the block first, so that the others find what it built or
    downloaded."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def summed(counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, added over the processes; all of them have to ask."""
    if num_processes() == 1:
        return counts
    import torch

    all_counts: list = [None] * num_processes()
    _state()
    with waiting():
        torch.distributed.all_gather_object(all_counts, counts)
    names = sorted(set().union(*all_counts))
    return {name: sum(counted.get(name, 0) for counted in all_counts) for name in names}


def shards_base() -> bool:
    """Whether the launch divides the base's own weights over the processes while a fit lasts: FSDP
    or ZeRO-3."""
    return num_processes() > 1 and (_flag_set("ACCELERATE_USE_FSDP") or _zero_stage() == 3)


def _flag_set(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")


def _zero_stage() -> int:
    return (
        int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if _flag_set("ACCELERATE_USE_DEEPSPEED")
        else 0
    )


def check_launch(settings: "PolicySettings") -> None:
    """Raises UserError where the launch's configuration cannot fit this policy; nothing without a
    launch."""
    if num_processes() == 1:
        return
    import torch

    on_gpus = torch.cuda.is_available() and not _flag_set("ACCELERATE_USE_CPU")
    if settings.device == "cpu" and on_gpus:
        raise UserError(
            "policy.device: cpu, but the launch is on GPUs; set ACCELERATE_USE_CPU=true for the "
            "launch, or policy.device: auto"
        )
    if shards_base() and settings.quantization != "none":
        raise UserError(
            f"policy.quantization: a base in {settings.quantization} is not sharded by FSDP or "
            "ZeRO-3; launch with "
            "recipes/accelerate/ddp.yaml, where every device holds its own quantized base, or set "
            "policy.quantization: none"
        )
    if not _flag_set("ACCELERATE_USE_FSDP"):
        return
    if not on_gpus:
        raise UserError(
            "accelerate launch: FSDP was asked for, but accelerate shards on GPUs only and would "
            "run DDP without a word; launch with "
            "recipes/accelerate/ddp_cpu.yaml"
        )
    if os.environ.get("FSDP_VERSION") != "2" or _flag_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "accelerate launch: FSDP has to be version 2 and every process has to load the base, "
            "since it samples from it; set "
            "fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false, as in "
            "recipes/accelerate/fsdp.yaml"
        )


def join_launch() -> None:
    """Joins the other processes; all but the main one fall silent, progress bars included, until
    they have an error to tell."""
    # DDP warns of find_unused_parameters, the Trainer's choice; a mixture of experts does leave
    # adapters unused in a step.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_main():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with waiting(launch_words() if is_main() else None):
        _state()


def may_speak() -> bool:
    """True for the first process of the launch that asks, which is the one whose error ended the
    others; its stderr is opened again."""
    import torch

    try:
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        first = (
            store.add(
                f"constrained-dpo/last-words/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1
            )
            == 1
        )
    except (
        torch.distributed.DistError,
        RuntimeError,
    ):  # the launcher is gone, and its store with it
        first = is_main()
    if first:
        sys.stderr = sys.__stderr__
    return first


def run_launched(command: Callable[[], None]) -> NoReturn:
    """Runs a command as one process of a launch and ends this process; whoever fails first says
    why, for all.

    A process that failed leaves at once: taking leave of the others, who wait for it elsewhere,
    could last forever.
    """
    code: object = 0
    try:
        command()
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        code = 1
        if may_speak():
            _explain(error)
    if code:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 1)
    _state().destroy_process_group()
    sys.exit(0)


def _explain(error: Exception) -> None:
    """A lost connection in one line; anything else is a fault of this program, with its
    traceback."""
    import torch

    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    ):
        print(
            "error: another process of the launch ended without a word (killed, or out of "
            "memory?); the run directory is left resumable: "
            "give the same command again",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error, file=sys.stderr)
