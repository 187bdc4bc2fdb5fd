"""Kills, full disks, long runs: the whole of what nbs/lib/53_reliability tries a little of. Every promise that is broken raises.

    python nbs/bench/reliability.py [--kills 20] [--out reports/reliability.json]

Each job of `protmae.reliability.JOBS` is killed `--kills` times, runs out of space on a tmpfs (where one may be mounted) and under a limit on file sizes, and
each time must end like an uninterrupted run; a Jupyter kernel is interrupted; four soaks are sampled. Models and data are small and SYNTHETIC. It works in
memory (/dev/shm) where that is allowed: a kill takes nothing from the page cache, so the disk makes no difference. A power cut is not tested.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from protmae.reliability import JOBS, SOAKS, interrupt_kernel, prepare, soak, squeeze, survive
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--out", default="reports/reliability.json")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    t0 = time.perf_counter()
    torch.set_num_threads(1)
    facts = provenance()
    jobs = [j for j in JOBS if not j.startswith("soak")]
    tmp = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    res = dict(
        what="kills, full disks, interrupts and soaks",
        command=" ".join(["python nbs/bench/reliability.py", *sys.argv[1:]]),
        **facts,
        kills={},
        full_disk={},
        soak={},
    )
    try:
        begin = prepare(tmp)
        for j in jobs:
            res["kills"][j] = r = survive(j, begin[j], tmp, a.kills, a.seed)
            print(f"{j}: {r['kills']} kills, {r['while_writing']} within a write", flush=True)
        for j in jobs:
            res["full_disk"][j] = {
                how: squeeze(j, begin[j], tmp, (0.05, 0.3, 0.55, 0.8, 0.95), how == "tmpfs")
                for how in ("tmpfs", "file size limit")
            }
            print(f"{j}: {res['full_disk'][j]}", flush=True)
        shutil.copytree(begin["v5"], tmp / "kernel")
        said = interrupt_kernel(tmp / "kernel")
        assert "saved in run; run it again with resume=True to go on" in said and said.endswith("KeyboardInterrupt"), (
            said
        )
        res["interrupted_kernel"] = said[-160:].splitlines()[-1]
        for k in SOAKS:
            shutil.copytree(begin["v5"], tmp / k)
            res["soak"][k] = r = soak(k, tmp / k)
            print(f"{k}: {r['growth_mb']:+.2f} MB, {r['growth_files']:+.1f} files behind the warm-up", flush=True)
            assert r["growth_mb"] < r["bound_mb"] and r["growth_files"] < r["bound_files"], r
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    write_json(a.out, res | dict(seconds=time.perf_counter() - t0))
    print(a.out)


if __name__ == "__main__":
    main()
