"""Damaged stores: does a damaged HDF5 file ever give anything but a `ProtmaeError` or the true numbers?

    python nbs/bench/fuzz.py [--runs 100000] [--seed 0] [--workers 1] [--sealed] [--out reports/bench/fuzz.json]

A tiny store (4 proteins, synthetic numbers) is damaged in memory, in a different way for each seed: bits, runs of
bytes, blocks moved or swapped, the end cut off, fields of the HDF5 structure set to special values. It is written to a
RAM disk where there is one, opened, verified, and read as a batch. Right is: a `ProtmaeError`; or `verify` passes, and
ids, sequences, lengths, rows and moments are those of the store before. Wrong is everything else: another exception,
other numbers, a run of more than `--timeout` seconds, a death of the process within the HDF5 library (which gets no
more than 1 GB of memory). Workers are processes of their own, so that a death or a hang costs one of them and is put
down to its seed.

With --sealed the seal is made again after the damage, as it is in a file that somebody damaged on purpose, or that
never had a seal. The figures are written after every --chunk runs; after a Ctrl-C the same command with --resume goes
on. `--replay SEED ...` shows what given seeds do, each in a process of its own.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
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
from protmae.data.writer import StoreWriter, create
from protmae.utils.files import write_json
from protmae.utils.progress import Progress
from protmae.utils.provenance import provenance

LENGTHS, DIM = (1, 3, 7, 2), 3
FATES = "refused", "intact", "exception", "wrong numbers", "death", "hang"
RIGHT = FATES[:2]
PARTS = "ids", "sequences", "model", "dim", "lengths", "rows", "moments"  # of `contents`
SPECIAL = [0, 1, 2, 3, 7, 8, 16, 255, 256, 4096]  # values at which programs stumble
SPECIAL += [1 << 15, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
MEMORY = 1 << 30  # bytes that a worker may use beyond those it starts with


# ---- one damaged store


def base_store(path) -> bytes:
    "The store that is damaged: the same bytes each time, for one version of the HDF5 library."
    path.unlink(missing_ok=True)
    rng = np.random.default_rng(0)
    ids = [f"P{i}" for i in range(len(LENGTHS))]
    sequences = ["MKVLAGW"[:length] for length in LENGTHS]
    create(path, ids, sequences, DIM, "synthetic", "none", provenance="{}", segments=[0, len(ids)])
    with StoreWriter(path) as writer:
        writer.write((i, rng.normal(size=(length, DIM))) for i, length in enumerate(LENGTHS))
    return path.read_bytes()


def contents(store) -> tuple:
    "Everything that a result can depend on, in the order of `PARTS`."
    rows, lengths = store.batch(np.arange(len(store)))
    moments = np.stack(store.moments())
    return store.ids, store.sequences, store.model, store.dim, lengths.tolist(), rows.tobytes(), moments


def pick_place(rng, data, hot):
    "An offset, most often one of the structure."
    if hot and rng.random() < 0.7:
        return rng.choice(hot) % len(data)
    return rng.randrange(len(data))


def swap_blocks(rng, data, hot, place, length):
    other = pick_place(rng, data, hot)
    one, two = data[place : place + length], data[other : other + length]
    size = min(len(one), len(two))
    data[place : place + size], data[other : other + size] = two[:size], one[:size]


def set_field(rng, data, hot, place, file_size):
    "A field of the structure (a size, an address, a count, a version) gets a special value."
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice((rng.choice(SPECIAL), file_size - rng.randrange(9), rng.choice(hot or (0,)) // 8 * 8))
    if rng.random() < 0.5:
        place -= place % width
    field = (value % (1 << 8 * width)).to_bytes(width, "little")
    data[place : place + width] = field[: len(data[place : place + width])]


def damage(rng, data, hot, file_size):
    "Change the bytes in one way."
    place, way, length = pick_place(rng, data, hot), rng.randrange(8), rng.choice((1, 2, 4, 8, 16, 64, 512))
    block = slice(place, place + length)
    if way < 2:
        data[place] ^= 1 << rng.randrange(8)
    elif way == 2:
        data[block] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * len(data[block])
    elif way == 3:
        data[block] = rng.randbytes(len(data[block]))
    elif way == 4 and rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    elif way == 5:
        swap_blocks(rng, data, hot, place, length)
    else:
        set_field(rng, data, hot, place, file_size)


def mutate(
    raw: bytes,  # of a file
    seed: int,
    hot=(),  # offsets of bytes that are not 0: the structure
) -> bytes:
    "The bytes, damaged in one to four ways."
    rng, data = random.Random(seed), bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            damage(rng, data, hot, len(raw))
    return bytes(data)


def is_same(one, two):
    "Whether two values are equal; moments are summed again by `verify`, and equal to a millionth."
    return np.allclose(one, two, 1e-6, 1e-9) if isinstance(one, np.ndarray) else one == two


def attempt(
    path,  # of a damaged store
    expected,  # `contents` of the store before
) -> tuple:  # one of `FATES`, and details
    "Open a store, verify it, read a batch."
    try:
        with contextlib.redirect_stdout(io.StringIO()), EmbeddingStore(path) as store:
            verify(store)
            found = contents(store)
        parts = zip(PARTS, found, expected, strict=True)
        different = [name for name, one, two in parts if not is_same(one, two)]
        return ("wrong numbers", different[0]) if different else ("intact", "")
    except ProtmaeError as e:
        return "refused", str(e)
    except Exception as e:
        return "exception", f"{type(e).__name__}: {e}"


class Bench:
    "What every worker needs: a folder, the store's bytes and its contents."

    def __init__(
        self,
        folder,  # for the damaged files
        sealed: bool = False,  # make the seal again after the damage
    ):
        self.folder, self.sealed = Path(folder), sealed
        self.raw = base_store(self.folder / "base.h5")
        with EmbeddingStore(self.folder / "base.h5") as store:
            self.expected = contents(store)
        self.spaces = check_seal(self.folder / "base.h5")
        self.hot = [i for i, value in enumerate(self.raw) if value]
        self.hot_behind_seal = [i - FRONT for i in self.hot if i >= FRONT]

    def one(self, seed, name="x"):
        "What a seed does, in this process."
        path = self.folder / f"{name}.h5"
        if self.sealed:
            path.write_bytes(self.raw[:FRONT] + mutate(self.raw[FRONT:], seed, self.hot_behind_seal))
            seal(path, self.spaces)
        else:
            path.write_bytes(mutate(self.raw, seed, self.hot))
        return attempt(path, self.expected)


# ---- many, in processes that may die


def limit_memory():
    "Give this process no more than `MEMORY` beyond what it has; only Linux tells how much that is."
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))


def work(bench, number, seeds, counts, now, outbox):
    "What runs in a worker: seeds in turn; `now` tells which, and since when."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_memory()
    for seed in seeds:
        now[0], now[1] = seed, time.monotonic()
        fate, details = bench.one(seed, number)
        counts[FATES.index(fate)] += 1
        if fate not in RIGHT:
            outbox.send((seed, fate, details))
    now[0] = seeds.stop
    outbox.close()


class Worker:
    "A process that runs the seeds of a range."

    def __init__(
        self,
        bench: Bench,
        number: int,  # names its files
        seeds: range,
    ):
        context = multiprocessing.get_context("fork")
        self.seeds = seeds
        self.counts = context.Array("q", len(FATES), lock=False)
        self.now = context.Array("d", [seeds.start, time.monotonic()], lock=False)
        self.inbox, outbox = context.Pipe(False)
        arguments = bench, number, seeds, self.counts, self.now, outbox
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        outbox.close()

    @property
    def seed(self):
        "The one that runs."
        return int(self.now[0])

    def received(self) -> list:
        "Failures that the process has reported since the last call: (seed, fate, details)."
        failures = []
        with contextlib.suppress(EOFError):
            while self.inbox.poll():
                failures.append(self.inbox.recv())
        return failures

    def failure(self, timeout) -> list | None:  # None: it runs; empty: it has ended well
        "How the process ended; one that hangs is killed."
        is_alive = self.process.is_alive()
        is_hung = is_alive and self.seed < self.seeds.stop and time.monotonic() - self.now[1] > timeout
        if is_alive and not is_hung:
            return None
        if is_hung:
            self.process.kill()
        self.process.join()
        if is_hung:
            return [(self.seed, "hang", f"more than {timeout:g} s")]
        if self.process.exitcode:
            return [(self.seed, "death", f"exit status {self.process.exitcode}")]
        return []

    def stop(self):
        self.process.kill()
        self.process.join()


class Stopped(KeyboardInterrupt):
    "Ctrl-C; the figures until then are of no whole chunk."


def fuzz(
    first: int,  # seed
    last: int,  # seed after the last one
    workers: int = 1,
    timeout: float = 10.0,  # seconds that one run may take
    show: bool = True,  # progress
    sealed: bool = False,  # make the seal again after the damage
) -> tuple:  # counts by fate, list of (seed, fate, details) of what is wrong
    "Run seeds, whatever happens to the processes that do it."
    total, failures = collections.Counter(), []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=memory) as folder,
        Progress(last - first, "fuzz", "runs", every=15, show=show) as bar,
    ):
        bench = Bench(folder, sealed)
        running = {k: Worker(bench, k, range(first + k, last, workers)) for k in range(workers)}
        try:
            while running:
                time.sleep(0.05)
                for number, worker in list(running.items()):
                    ended = worker.failure(timeout)
                    failures += worker.received()
                    if ended is None:
                        continue
                    del running[number]
                    failures += ended
                    total.update(dict(zip(FATES, worker.counts, strict=True)))
                    total.update(fate for _, fate, _ in ended)
                    left = range(worker.seed + workers, last, workers)
                    if ended and left:
                        running[number] = Worker(bench, number, left)
                done = sum(total.values()) + sum(sum(worker.counts) for worker in running.values())
                bar.update(done - bar.done)
        except KeyboardInterrupt:
            for worker in running.values():
                worker.stop()
            raise Stopped from None
    return total, failures


# ---- the command


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="first seed; run i is seed + i")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that one run may take")
    parser.add_argument("--chunk", type=int, default=10_000, help="runs between two writings of the figures")
    parser.add_argument("--out", default="reports/bench/fuzz.json")
    parser.add_argument("--resume", action="store_true", help="go on with the figures in --out")
    parser.add_argument("--sealed", action="store_true", help="make the seal again after the damage")
    parser.add_argument("--replay", type=int, nargs="+")
    return parser.parse_args(argv)


def figures_so_far(options) -> dict:
    "New figures, or those of --out; raises `ProtmaeError` if they are of other seeds or another library."
    same = dict(seed=options.seed, sealed=options.sealed, h5py=h5py.__version__, hdf5=h5py.version.hdf5_version)
    out = Path(options.out)
    if options.resume and out.exists():
        figures = json.loads(out.read_text())
        earlier = {name: figures.get(name) for name in same}
        if earlier != same:
            raise ProtmaeError(f"{out} holds figures of {earlier}, now {same}; choose another --out")
        return figures
    what = "a tiny SYNTHETIC store, damaged in a different way by each seed: opened, verified, read"
    return dict(what=what, **same, runs=0, seconds=0.0, fates=dict.fromkeys(FATES, 0), failures=[])


def run_chunk(figures, options):
    "Add the next seeds to the figures, and write them."
    started = time.perf_counter()
    count = min(options.chunk, options.runs - figures["runs"])
    first = options.seed + figures["runs"]
    total, failures = fuzz(first, first + count, options.workers, options.timeout, sealed=options.sealed)
    if sum(total.values()) != count:
        raise RuntimeError(f"{sum(total.values())} of {count} runs are accounted for")
    figures["seconds"] += time.perf_counter() - started
    figures["runs"] += count
    for fate in FATES:
        figures["fates"][fate] += total[fate]
    for seed, fate, details in sorted(failures):
        figures["failures"].append(dict(seed=seed, fate=fate, what=str(details)[:300]))
    rate = figures["runs"] / figures["seconds"]
    write_json(options.out, figures | dict(runs_per_s=rate, workers=options.workers, provenance=provenance()))


def main(argv=None):
    options = parse(argv)
    if options.replay:
        for seed in options.replay:
            _, failures = fuzz(seed, seed + 1, timeout=options.timeout, show=False, sealed=options.sealed)
            print(seed, *failures or ["right"])
        return 0
    figures = figures_so_far(options)
    try:
        while figures["runs"] < options.runs:
            run_chunk(figures, options)
    except Stopped:
        print("interrupted; figures up to the last whole chunk are kept")
    rate = figures["runs"] / max(figures["seconds"], 1e-9)
    fates = ", ".join(f"{count:,} {fate}" for fate, count in figures["fates"].items())
    print(f"{figures['runs']:,} runs in {figures['seconds']:.0f} s, {rate:,.0f} runs/s: {fates}")
    for failure in figures["failures"][:20]:
        print(f"  seed {failure['seed']}: {failure['fate']}: {failure['what']}")
    return int(len(figures["failures"]) > 0)


if __name__ == "__main__":
    sys.exit(main())
