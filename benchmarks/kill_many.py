"""Pulls the plug of real runs on the embedded world, many times, and compares each with a run
that was never stopped.

    python -m benchmarks.kill_many [--kills 100] [--seed 0]   kill -9 at moments uniform over a run
    python -m benchmarks.kill_many --disk-full                a full file system (mounts a tmpfs)
    python -m benchmarks.kill_many --interrupt                Ctrl-C and SIGTERM in every phase

Not part of the suite: it takes most of an hour. Run directories are killed and resumed several
times (a chain) until they are done, then compared. A moment is a phase of the uninterrupted run
and the seconds since it began, so that phases are hit in proportion to their time however often
a resumed process repeats one. The world's enumeration, half of a run's time in a few steps, is
left out unless `--exact`. Every process under test is a fork of a server that has only imported
the libraries, so that a start costs no 10 s; each chain has a server of its own, with its own
hash seed and memory layout. Exits 1 on any failure.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.kill_runs import Tally, new_run, reference_run
from constrained_dpo.run.directory import RunDirectory
from tests.helpers.wrecks import (
    Server,
    alive,
    broken_files,
    differences,
    half_written,
    leftovers,
    lock_is_free,
    phase,
)

KILLS_PER_CHAIN = 6
FULL_DISKS = 40
AIMED_SHARE = (
    0.4  # of the kills: at the first half-written file that shows up after the drawn moment
)
PATIENCE = 240  # seconds until an aimed kill gives up, and until a run counts as hanging


def kill_at(
    server: Server,
    run: RunDirectory,
    target: tuple[int, str],
    seconds: float,
    loading: float,
    aimed: bool,
) -> bool:
    """Plays the run and kills its process group `seconds` into the phase `target`, or at the first
    half-written file behind that moment.

    loading: seconds more where the process finds itself in that phase from its start. False if the
    run ended before.
    """
    order = [
        "prepare: pool",
        "prepare: reference",
        "prepare: optimum",
        "relabel",
        "fit",
        "rescore",
        "grow pool",
        "estimates",
        "commit",
    ]
    pid, start = server.start("run", run.path), time.time()
    last, began, armed = phase(run), start, False
    wait = seconds + (loading if last == target else 0.0)
    while alive(pid):
        now = time.time()
        if not armed:
            current = phase(run)
            if current != last:
                last, began = current, now
            past = (current[0], order.index(current[1])) > (target[0], order.index(target[1]))
            armed = past or (current == target and now - began >= wait)
        if armed and (not aimed or half_written(run)):
            os.killpg(pid, signal.SIGKILL)
            break
        if now - start > PATIENCE:
            os.killpg(pid, signal.SIGKILL)
            raise TimeoutError(f"{run.path}: no end after {PATIENCE} s")
        # An atomic write lasts a few milliseconds: where one is aimed at, there is no time to
        # sleep.
        time.sleep(0.0002 if armed else 0.005)
    return server.wait() == -signal.SIGKILL


def inspect_wreck(run: RunDirectory, tally: Tally) -> None:
    """What a reader finds right after the kill."""
    tally.counts["kills"] += 1
    tally.phases[phase(run)[1]] += 1
    for kind in {
        "adapter" if ".adapter.tmp" in str(p) else p.name.split(".")[-4] for p in half_written(run)
    }:
        tally.inside[kind] += 1
    tally.fail("half files", broken_files(run))
    if not lock_is_free(run):
        tally.fail("stale locks", [str(run.path)])


def chain(
    run: RunDirectory,
    moments: list[tuple[tuple[int, str], float]],
    expected: dict,
    draw: random.Random,
    tally: Tally,
) -> None:
    """One run directory: killed at each moment (phase, seconds into it), resumed each time, then
    compared."""
    server = Server(run.path.parent)
    for target, seconds in moments:
        # A resumed process first spends a few seconds on loading the policy: some kills fall
        # into that, most behind it.
        if not kill_at(
            server, run, target, seconds, draw.uniform(0, 4), aimed=draw.random() < AIMED_SHARE
        ):
            break
        inspect_wreck(run, tally)
    server.start("run", run.path)
    status = server.wait()
    server.close()
    tally.counts["chains"] += 1
    if status != 0:
        tally.fail(
            "failed resumes", [f"{run.path}: exit {status}: {server.log.read_text()[-300:]}"]
        )
        return
    tally.fail("differences", differences(run, expected))
    tally.fail("leftovers", leftovers(run))
    print(
        f"{run.path.name}: {tally.counts['kills']} kills so far, {len(tally.failures)} failures; "
        f"{dict(tally.phases)}",
        flush=True,
    )
    if not tally.failures:
        shutil.rmtree(run.path)


def kills(folder: Path, count: int, seed: int, exact: bool) -> int:
    expected, phases, seconds = reference_run(folder, exact)
    draw, tally = random.Random(seed), Tally()
    while tally.counts["kills"] < count:
        moments = []
        for second in sorted(
            draw.uniform(0, seconds)
            for _ in range(min(KILLS_PER_CHAIN, count - tally.counts["kills"]))
        ):
            target, began = [p for p in phases if p[1] <= second or p is phases[0]][-1]
            moments.append((target, max(second - began, 0.0)))
        chain(
            new_run(folder / f"chain-{tally.counts['chains']:03d}", exact),
            moments,
            expected,
            draw,
            tally,
        )
    return tally.report(f"{count} kills, moments uniform over {seconds:.0f} s, seed {seed}")


def used_bytes(mount: Path) -> int:
    facts = os.statvfs(mount)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def disk_full(folder: Path, seed: int, exact: bool) -> int:
    """A tmpfs with room for a few more blocks (as root): an error each time, then a few more; at
    last room enough to finish."""
    expected, _, _ = reference_run(folder, exact)
    mount, tally, server, draw = folder / "small-disk", Tally(), Server(folder), random.Random(seed)
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
    try:
        run, status, size, before = new_run(mount / "run", exact), 1, 0, -1
        while status != 0:
            used = used_bytes(mount)
            size = (size if used == before else used) + 4096 * draw.randint(2, 14)
            if tally.counts["full disks"] >= FULL_DISKS:
                size = 2**26  # space is made
            before = used
            subprocess.run(["mount", "-o", f"remount,size={size}", mount], check=True)
            server.start("run", run.path)
            status, lines = server.wait(), server.log.read_text().strip().splitlines()
            tally.fail("half files", broken_files(run))
            if not lock_is_free(run):
                tally.fail("stale locks", [str(run.path)])
            if status == 0:
                break
            errors = [line for line in lines if not line.startswith(("prepare:", "round "))]
            tally.counts["full disks"] += 1
            tally.phases[phase(run)[1]] += 1
            print(
                f"{used // 1024} of {size // 1024} KiB used: exit {status} in {phase(run)[1]}: "
                f"{errors}",
                flush=True,
            )
            clear = (
                len(errors) == 1
                and any(words in errors[0] for words in ("No space left", "disk is full"))
                and str(mount) in errors[0]
            )
            if status != 1 or not clear:
                tally.fail("unclear errors", [f"{size} bytes: exit {status}, {errors}"])
        tally.fail("differences", differences(run, expected))
        tally.fail("leftovers", leftovers(run))
    finally:
        server.close()
        subprocess.run(["umount", mount], check=False)
    return tally.report("a full disk, again and again")


def interrupt(folder: Path, exact: bool) -> int:
    """SIGINT, then SIGTERM, in the middle of each phase; seconds until the process is gone, what it
    says, and the result."""
    expected, _, _ = reference_run(folder, exact)
    tally, server = Tally(), Server(folder)
    for name, number in (("SIGINT", 130), ("SIGTERM", 143)):
        run = new_run(folder / name, exact)
        moments = {
            "prepare": lambda run=run: any(run.shard_folder("pool").glob("*.parquet")),
            "fit": lambda run=run: (run.round_folder(0) / ".adapter.tmp").exists(),
            "rescore": lambda run=run: any(run.shard_folder("round-000").glob("*.parquet")),
        }
        for where, reached in moments.items():
            pid = server.start("run", run.path)
            while alive(pid) and not reached():
                time.sleep(0.002)
            start = time.time()
            if alive(pid):
                os.killpg(pid, getattr(signal, name))
            status, seconds = server.wait(), time.time() - start
            lines = server.log.read_text().strip().splitlines()
            print(
                f"{name} in {where}: exit {status} after {seconds:.2f} s: {lines[-1:]}", flush=True
            )
            tally.counts[name] += 1
            tally.phases[where] += 1
            if (
                status != number
                or seconds > 15
                or "resumes" not in lines[-1]
                or "Traceback" in "\n".join(lines)
            ):
                tally.fail(
                    "bad stops",
                    [f"{name} in {where}: exit {status} after {seconds:.1f} s: {lines[-3:]}"],
                )
            tally.fail("half files", broken_files(run))
        server.start("run", run.path)
        if server.wait() != 0:
            tally.fail("failed resumes", [server.log.read_text()[-300:]])
        else:
            tally.fail("differences", differences(run, expected))
            tally.fail("leftovers", leftovers(run))
    server.close()
    return tally.report("interrupts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk-full", action="store_true")
    parser.add_argument("--interrupt", action="store_true")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="enumerate the world in prepare and in every round, as the quickstart does",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cdpo-kills-") as folder:
        if options.disk_full:
            code = disk_full(Path(folder), options.seed, options.exact)
        elif options.interrupt:
            code = interrupt(Path(folder), options.exact)
        else:
            code = kills(Path(folder), options.kills, options.seed, options.exact)
    sys.exit(code)


if __name__ == "__main__":
    main()
