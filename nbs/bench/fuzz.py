"""Mutated stores: does a damaged or hostile HDF5 file ever give anything but a `ProtmaeError` or the true numbers?

    python nbs/bench/fuzz.py [--runs 100000] [--seed 0] [--workers 1] [--sealed] [--out reports/bench/fuzz.json]

A tiny store (4 proteins, SYNTHETIC numbers) is damaged in memory, a different way for each seed (bits, runs of bytes, blocks moved or swapped, the end cut
off, fields of the HDF5 structure set to telling values), written to a RAM disk where there is one, opened, verified, and read as a batch. Right is: a
`ProtmaeError`; or `verify` passes and ids, sequences, lengths, rows and moments are those of the store before. Wrong is everything else: another
exception, other numbers, a run of more than `--timeout` seconds, a death of the process inside the HDF5 library (which gets no more than 1 GB of memory). Runs are done in processes of
their own, so that a death or a hang costs one of them and is put down to its seed. With --sealed the damage is behind the seal, which is made anew: what a file meets that
was damaged by somebody who means it, or that never had a seal. The figures are written after every --chunk runs; after a Ctrl-C the same command with --resume goes on.
`--replay SEED ...` shows what given seeds do, in a process of their own each.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing as mp
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from protmae.core import ProtmaeError
from protmae.data.seal import FRONT, check_seal, seal
from protmae.data.store import EmbeddingStore, verify
from protmae.data.writer import StoreWriter, _plan
from protmae.utils.files import write_json
from protmae.utils.progress import Progress
from protmae.utils.provenance import provenance

LENGTHS, DIM = (1, 3, 7, 2), 3
FATES = "refused", "intact", "exception", "wrong numbers", "death", "hang"  # the first two are right


def base_store(
    path,  # .h5 to write
):
    "The store that is damaged: the same bytes each time, for one version of the HDF5 library."
    rng = np.random.default_rng(0)
    ids = [f"P{i}" for i in range(len(LENGTHS))]
    _plan(
        path,
        ids,
        ["MKVLAGW"[:l] for l in LENGTHS],
        LENGTHS,
        DIM,
        dict(model="synthetic", layer="none", provenance="{}", segments=[0, len(ids)]),
        None,
    )
    with StoreWriter(path) as w:
        w.write((i, rng.normal(size=(l, DIM))) for i, l in enumerate(LENGTHS))
    return Path(path).read_bytes()


def contents(s):
    "Everything a result can depend on."
    rows, lengths = s.batch(np.arange(len(s)))
    return s.ids, s.sequences, s.model, s.dim, lengths.tolist(), rows.tobytes(), np.stack(s.moments())


TELLING = [
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    255,
    256,
    4096,
    1 << 15,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def mutate(
    raw,  # bytes of a file
    seed,
    hot=(),  # offsets of bytes that are not 0: the structure
) -> bytes:
    "The bytes, damaged in one to four ways."
    r, b = random.Random(seed), bytearray(raw)
    where = lambda: r.choice(hot) % len(b) if hot and r.random() < 0.7 else r.randrange(len(b))
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        if not b:
            break
        at, way, n = where(), r.randrange(8), r.choice((1, 2, 4, 8, 16, 64, 512))
        if way < 2:
            b[at] ^= 1 << r.randrange(8)
        elif way == 2:
            b[at : at + n] = r.choice((b"\0", b"\xff", r.randbytes(1))) * len(b[at : at + n])
        elif way == 3:
            b[at : at + n] = r.randbytes(len(b[at : at + n]))
        elif way == 4 and r.random() < 0.3:
            del b[r.randrange(len(b)) :]
        elif way == 5:
            o = where()
            x, y = b[at : at + n], b[o : o + n]
            m = min(len(x), len(y))
            b[at : at + m], b[o : o + m] = y[:m], x[:m]
        else:  # a field of the structure: size, address, count, version
            w = r.choice((1, 2, 4, 8))
            v = r.choice((r.choice(TELLING), len(raw) - r.randrange(9), r.choice(hot or (0,)) // 8 * 8))
            at -= at % w if r.random() < 0.5 else 0
            b[at : at + w] = (v % (1 << 8 * w)).to_bytes(w, "little")[: len(b[at : at + w])]
    return bytes(b)


def attempt(
    path,  # of a damaged store
    want,  # `contents` of the store before
) -> tuple:  # one of `FATES`, and what was said
    "Open, verify, read a batch."
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            with EmbeddingStore(path) as s:
                verify(s)
                got = contents(s)
        same = lambda a, b: (
            np.allclose(a, b, 1e-6, 1e-9) if isinstance(a, np.ndarray) else a == b
        )  # moments are summed again by `verify`: to a millionth
        other = [
            k
            for k, a, b in zip(("ids", "sequences", "model", "dim", "lengths", "rows", "moments"), got, want)
            if not same(a, b)
        ]
        return ("wrong numbers", other[0]) if other else ("intact", "")
    except ProtmaeError as e:
        return "refused", str(e)
    except Exception as e:
        return "exception", f"{type(e).__name__}: {e}"


class Bench:
    "What every worker needs: the store's bytes, its contents, a folder."

    def __init__(self, folder, sealed=False):
        self.folder, self.sealed = Path(folder), sealed
        self.raw = base_store(self.folder / "base.h5")
        with EmbeddingStore(self.folder / "base.h5") as s:
            self.want = contents(s)
        self.spaces = check_seal(self.folder / "base.h5")
        self.hot = [i for i, v in enumerate(self.raw) if v]
        self.inner = [i - FRONT for i in self.hot if i >= FRONT]

    def one(self, seed, name="x"):
        "What seed does, in this process."
        f = self.folder / f"{name}.h5"
        if self.sealed:
            f.write_bytes(self.raw[:FRONT] + mutate(self.raw[FRONT:], seed, self.inner))
            seal(f, self.spaces)
        else:
            f.write_bytes(mutate(self.raw, seed, self.hot))
        return attempt(f, self.want)


def work(bench, k, seeds, step, counts, now, said):
    "Seeds in turn; `now` tells the watcher which, and since when."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if Path("/proc/self/statm").exists()
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
    for i in range(*seeds, step):
        now[0], now[1] = i, time.monotonic()
        fate, what = bench.one(i, k)
        counts[FATES.index(fate)] += 1
        if FATES.index(fate) > 1:
            said.send((i, fate, what))
    now[0] = seeds[1]
    said.close()


def start(bench, k, seeds, step):
    ctx = mp.get_context("fork")
    counts, now = ctx.Array("q", len(FATES), lock=False), ctx.Array("d", [seeds[0], time.monotonic()], lock=False)
    inbox, said = ctx.Pipe(False)
    p = ctx.Process(target=work, args=(bench, k, seeds, step, counts, now, said), daemon=True)
    p.start()
    said.close()
    return dict(p=p, counts=counts, now=now, inbox=inbox, seeds=seeds)


def fuzz(
    first,
    last,  # seeds
    workers=1,
    timeout=10.0,
    show=True,
    sealed=False,  # make the seal anew after the damage
) -> tuple:  # seeds done, counts by fate, list of (seed, fate, what)
    "Run seeds first to last, whatever happens to the processes that do it."
    total, bad = collections.Counter(), []
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as d,
        Progress(last - first, "fuzz", "runs", every=15, show=show) as bar,
    ):
        bench, jobs = Bench(d, sealed), {}
        for k in range(workers):
            jobs[k] = start(bench, k, (first + k, last), workers)

        def collect(j):
            while j["inbox"].poll():
                try:
                    bad.append(j["inbox"].recv())
                except EOFError:
                    break

        def retire(j):
            collect(j)
            total.update(dict(zip(FATES, j["counts"])))

        try:
            while jobs:
                time.sleep(0.05)
                for k, j in list(jobs.items()):
                    collect(j)
                    at, since = int(j["now"][0]), j["now"][1]
                    alive = j["p"].is_alive()
                    hung = alive and at < last and time.monotonic() - since > timeout
                    if alive and not hung:
                        continue
                    if hung:
                        j["p"].kill()
                    j["p"].join()
                    retire(j)
                    del jobs[k]
                    if hung or j["p"].exitcode:
                        at = int(j["now"][0])
                        fate = "hang" if hung else "death"
                        total[fate] += 1
                        bad.append((at, fate, f"more than {timeout:g} s" if hung else f"exit status {j['p'].exitcode}"))
                        if at + workers < last:
                            jobs[k] = start(bench, k, (at + workers, last), workers)
                bar.update(sum(total.values()) + sum(sum(j["counts"]) for j in jobs.values()) - bar.done)
        except KeyboardInterrupt:
            for j in jobs.values():
                j["p"].kill()
                j["p"].join()
                retire(j)
            raise Stopped(total, bad) from None
    return total, bad


class Stopped(KeyboardInterrupt):
    "Ctrl-C, with what was done until then."


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=0, help="first seed; run i is seed + i")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--timeout", type=float, default=10.0, help="seconds that one run may take")
    p.add_argument("--chunk", type=int, default=10_000, help="runs between two writings of the figures")
    p.add_argument("--out", default="reports/bench/fuzz.json")
    p.add_argument("--resume", action="store_true", help="go on with the figures in --out")
    p.add_argument("--sealed", action="store_true", help="make the seal anew after the damage")
    p.add_argument("--replay", type=int, nargs="+")
    a = p.parse_args(argv)
    if a.replay:
        for s in a.replay:
            print(s, *fuzz(s, s + 1, timeout=a.timeout, show=False, sealed=a.sealed)[1] or ["right"])
        return 0
    out, same = Path(a.out), dict(seed=a.seed, sealed=a.sealed, h5py=h5py.__version__, hdf5=h5py.version.hdf5_version)
    got = dict(
        what="a tiny SYNTHETIC store, damaged in a different way by each seed: opened, verified, read",
        **same,
        runs=0,
        seconds=0.0,
        fates=dict.fromkeys(FATES, 0),
        failures=[],
    )
    if a.resume and out.exists():
        old = json.loads(out.read_text())
        if {k: old.get(k) for k in same} != same:
            raise ProtmaeError(
                f"{out} holds figures of { ({k: old.get(k) for k in same}) }, now {same}; choose another --out"
            )
        got = old
    stop = False
    while got["runs"] < a.runs and not stop:
        t, n = time.perf_counter(), min(a.chunk, a.runs - got["runs"])
        first = a.seed + got["runs"]
        try:
            total, bad = fuzz(first, first + n, a.workers, a.timeout, sealed=a.sealed)
        except Stopped:
            print("interrupted; figures up to the last whole chunk are kept")
            stop = True
            break
        got["seconds"] += time.perf_counter() - t
        got["runs"] += n
        for k in FATES:
            got["fates"][k] += total[k]
        got["failures"] += [dict(seed=s, fate=f, what=str(w)[:300]) for s, f, w in sorted(bad)]
        if sum(total.values()) != n:
            raise RuntimeError(f"{sum(total.values())} of {n} runs are accounted for")
        write_json(out, got | dict(runs_per_s=got["runs"] / got["seconds"], workers=a.workers, provenance=provenance()))
    print(
        f"{got['runs']:,} runs in {got['seconds']:.0f} s, {got['runs'] / max(got['seconds'], 1e-9):,.0f} runs/s: "
        + ", ".join(f"{v:,} {k}" for k, v in got["fates"].items())
    )
    for f in got["failures"][:20]:
        print(f"  seed {f['seed']}: {f['fate']}: {f['what']}")
    return int(len(got["failures"]) > 0)


if __name__ == "__main__":
    sys.exit(main())
