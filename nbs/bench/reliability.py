"""Kills, full disks and long runs: all of what nbs/tests/13_reliability.ipynb tries a little of.

    python nbs/bench/reliability.py [--kills 20] [--out reports/reliability.json]

Each job is killed `--kills` times, and asked to stop (SIGTERM, SIGHUP) half as often. It also runs out of space on a
tmpfs (where one may be mounted) and under a limit on file sizes. Each time it must end like a run without an
interruption. A Jupyter kernel is interrupted, and four long runs are sampled. A broken promise raises an error. Models
and data are small and synthetic. The work is done in memory (/dev/shm) where that is allowed: a kill loses nothing from
the page cache, so the disk makes no difference. A power cut is not tested.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reliability_attacks import SOAKS, interrupt_kernel, soak, squeeze, survive  # noqa: E402
from reliability_jobs import TEMPLATES, prepare  # noqa: E402

SHARES = 0.05, 0.3, 0.55, 0.8, 0.95  # of the space that a job needs


def attack_all(work, options):
    "Everything, in a new folder; returns the figures."
    figures = dict(kills={}, stops={}, full_disk={}, soak={})
    templates = prepare(work)
    for job in TEMPLATES:
        figures["kills"][job] = counts = survive(job, templates[job], work, options.kills, options.seed)
        print(f"{job}: {counts['kills']} kills, {counts['while_writing']} while a file was being written", flush=True)
    for job in TEMPLATES:
        signals = [signal.SIGTERM, signal.SIGHUP]
        counts = survive(job, templates[job], work, options.kills // 2, options.seed, signals)
        figures["stops"][job] = counts
        print(f"{job}: {counts['kills']} signals, obeyed within {counts['slowest']:.2f} s", flush=True)
        assert counts["slowest"] < 20, counts
    for job in TEMPLATES:
        figures["full_disk"][job] = {
            "tmpfs": squeeze(job, templates[job], work / "disk" / job, SHARES),
            "file size limit": squeeze(job, templates[job], work / "limit" / job, SHARES, disk=False),
        }
        print(f"{job}: {figures['full_disk'][job]}", flush=True)
    shutil.copytree(templates["v5"], work / "kernel")
    said = interrupt_kernel(work / "kernel")
    assert "saved in run; run it again with resume=True to go on" in said, said
    assert said.endswith("KeyboardInterrupt"), said
    figures["interrupted_kernel"] = said[-160:].splitlines()[-1]
    for name in SOAKS:
        shutil.copytree(templates["v5"], work / name)
        figures["soak"][name] = found = soak(name, work / name)
        print(f"{name}: {found['growth_mb']:+.2f} MB, {found['growth_files']:+.1f} files after the warm-up", flush=True)
        assert found["growth_mb"] < found["bound_mb"], found
        assert found["growth_files"] < found["bound_files"], found
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", default="reports/reliability.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    about = dict(
        what="kills, full disks, interrupts and soaks",
        command=" ".join(["python nbs/bench/reliability.py", *sys.argv[1:]]),
        **provenance(),
    )
    work = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        figures = attack_all(work, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_json(options.out, about | figures | dict(seconds=time.perf_counter() - started))
    print(options.out)


if __name__ == "__main__":
    main()
