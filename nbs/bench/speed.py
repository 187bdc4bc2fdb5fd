"""How fast: pretraining of V5 and V2, the store, and PPI training, against what people would write or pick instead.

    python nbs/bench/speed.py [--rows v5 v2 …] [--rounds 3] [--threads 2]
    python nbs/bench/speed.py --tiny --out /tmp/speed.json     # to see that it runs

Ours and the peer run in turn in this process: same threads, same data, same optimiser settings. Ours trains in the
precision that it chooses on this machine; a row says which, and which the peer's is. Each figure is the median of the
rounds, each ratio the median of the rounds' ratios. `share` is the arithmetic done per second over what a large matmul
reaches here in the same precision, measured in the same run. Data are SYNTHETIC: lengths drawn from the yeast
proteome's histogram (numbers in memory.py), embeddings random.

| row | ours | peer |
|---|---|---|
| v5 plain | steps of a real run, patch cache | one HDF5 dataset per protein, residues padded to 1502, all tokens |
| v5 vitmae | the same | `transformers.ViTMAEForPreTraining` of the same size, on 47 patches from the same cache, in \
float32 or under bf16 autocast, whichever is faster here |
| v5 float32 | the same | a run of ours in float32 |
| v2 plain | steps of a real run | the same network, nn.TransformerEncoder, padded to 1502 |
| v2 float32 | the same | a run of ours in float32 |
| attention | forward and backward of attention among the tokens of a batch, in bf16 (float32 is torch's) | torch's \
`scaled_dot_product_attention` |
| store | `EmbeddingStore.batch`, 32 random proteins | one HDF5 dataset per protein, see below; a bare numpy memmap |
| ppi | an epoch of pairs from the token cache | both proteins of every pair through the frozen encoder, every time |
| embed | ESM-2 and ESM-C of real sizes, random weights, as `protmae embed` runs them | transformers, one protein a \
batch and eight as they come |
| unirep | UniRep in bf16 | UniRep in float32 |
| predict | every pair of 500 proteins, to the file of scores | in float32; both proteins encoded per pair; D-SCRIPT |
| umap | seconds of a map of 20,000 proteins | |
| step-memory | peak memory of a process that takes V5 steps of 64 proteins | the same in float32 |
| start | seconds of `import protmae` and of `protmae --help` | |
| memory | peak memory of a V5 run on 20,000 proteins (memory.py) | every protein's array in a dict |

The HDF5 files of the store's row are written as D-SCRIPT writes them (lzf: float32, LZF), and as plain float16 (hdf).
Memory is counted besides model and optimiser. For V5 the report also says where the time of a step goes.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
import using
from clocks import in_turn
from memory import TINY_SIZES, lengths_of, real_store
from peers import TINY_PEER_V2, TINY_PEER_V5, PlainV2, PlainV5, adamw, update, vitmae, vitmae_loss

from protmae.core import MAX_LEN
from protmae.data.store import EmbeddingStore
from protmae.models.flops import count, training_flops
from protmae.models.token_layout import attention
from protmae.ppi.features import EncoderInputs
from protmae.ppi.pairs import Pairs
from protmae.ppi.splits import random_split
from protmae.ppi.training import PPITrainer
from protmae.training.pretrain import PretrainTrainer
from protmae.utils.files import write_json
from protmae.utils.provenance import git_commit, provenance

ROWS = ("v5", "v2", "attention", "store", "ppi", *using.MEASURES, "step-memory", "start", "memory")
TINY_V2 = dict(embed_dim=64, num_layers=1, nhead=4, ff_dim=128)
FOREVER = 1000  # epochs: more than are ever trained here
YEAST = dict(pairs=60_738, proteins=5_679)  # training pairs of B4PPI yeast, and the proteins in them
DRAWS, DRAWN = 20, 32  # batches that the store is asked for, proteins in each


# ---- training steps


class Steps:
    "Training steps of a run; batches as its own loader brings them."

    def __init__(self, run):
        self.run, self.batches = run, iter(())
        run.model.train()

    def next_batch(self):
        "The next batch; behind the last one the first."
        with suppress(StopIteration):
            return next(self.batches)
        self.batches = iter(self.run.train_dl)
        return next(self.batches)

    def take(self, count):
        "Train on so many batches."
        with self.run.arithmetic.memory():  # as `fit` does
            for _ in range(count):
                self.run.train_step(self.next_batch())

    def parts(self, count=5) -> dict:
        "Seconds of each part of a training step, median: what `train_step` does, taken apart."
        with self.run.arithmetic.memory():
            return self._parts(count)

    def _parts(self, count):
        run, found = self.run, []
        for _ in range(count + 1):
            times = [time.perf_counter()]
            batch = self.next_batch()
            times.append(time.perf_counter())
            with run.arithmetic.autocast():
                loss, _ = run.loss(batch)
            times.append(time.perf_counter())
            run.arithmetic.backward(loss)
            times.append(time.perf_counter())
            run.arithmetic.clip(run.model, run.config.clip)
            times.append(time.perf_counter())
            run.opt.step()
            run.opt.zero_grad()
            times.append(time.perf_counter())
            found.append(np.diff(times))
        medians = np.median(found[1:], 0).round(4).tolist()
        return dict(zip(("data", "forward", "backward", "clip", "optimiser"), medians, strict=True))


# ---- the benchmark


class Bench:
    "The data, the machine's limits, and the rows measured so far."

    def __init__(self, options, folder, measure=True):
        self.options, self.folder, self.tiny = options, folder, options.tiny
        self.n, self.dim = (160, 96) if options.tiny else (options.proteins, 960)
        self.rng, self.rows = np.random.default_rng(0), {}
        self.sizes_v5 = TINY_SIZES if options.tiny else {}
        self.sizes_v2 = TINY_V2 if options.tiny else {}
        self.lengths = np.maximum(lengths_of(self.n, self.rng), 33)
        self.ids, _ = real_store(folder / "store.h5", self.lengths, self.dim, self.rng)
        self.store = EmbeddingStore(folder / "store.h5")
        self.mean, self.std = (torch.as_tensor(values) for values in self.store.mean_std())
        self.limits = self.machine_limits() if measure else {}

    def machine_limits(self) -> dict:
        "What a matmul and a copy reach."
        n, size = (512, 2**20) if self.tiny else (4096, 2**28)
        one, two = torch.randn(n, n), torch.randn(n, n)
        source, target = torch.ones(size), torch.ones(size)
        half = [matrix.bfloat16() for matrix in (one, two)]
        jobs = dict(float32=partial(torch.matmul, one, two), bf16=partial(torch.matmul, *half))
        seconds, _ = in_turn(jobs | dict(copy=partial(target.copy_, source)), 5)
        single, halved = (2 * n**3 / seconds[name] / 1e9 for name in jobs)
        rate = 2 * 4 * size / seconds["copy"] / 1e9
        print(
            f"this machine: matmul {single:,.0f} GFLOP/s in float32, {halved:,.0f} in bf16, "
            f"copy {rate:,.1f} GB/s (read and written), {torch.get_num_threads()} threads"
        )
        return dict(matmul_gflops=single, matmul_bf16_gflops=halved, copy_gb_per_s=rate)

    def pretraining(self, arch, name, **changes):
        "A run of V2 or V5 on the store."
        sizes = self.sizes_v5 if arch == "v5" else self.sizes_v2
        return PretrainTrainer(arch, self.store, self.folder / name, sizes=sizes, cpu=True, **changes)

    def share(self, flops, seconds, precision="float32") -> float:
        "Arithmetic per second over what a matmul reaches in that precision."
        limit = self.limits["matmul_bf16_gflops" if precision == "bf16" else "matmul_gflops"]
        return flops / seconds / 1e9 / limit

    def padded(self, indices, read) -> tuple:
        "Standardised residues (B, 1502, D) and lengths (B,), as one writes it; `read` gives a protein's rows."
        x = torch.zeros(len(indices), MAX_LEN, self.dim)
        for padded, i in zip(x, indices, strict=True):
            padded[: self.lengths[i]] = (torch.from_numpy(read(i)).float() - self.mean) / self.std
        return x, torch.as_tensor(self.lengths[indices])

    def note(self, name, row):
        "A row that is no comparison."
        self.rows[name] = dict(commit=git_commit()) | row

    def add(self, name, unit, amount, timing, peer, goal, **more):
        "One row of the report: `amount` maps ours and peer to units per call, `timing` is from `in_turn`."
        seconds, rounds = timing
        ours, theirs = amount["ours"] / seconds["ours"], amount[peer] / seconds[peer]
        pairs = zip(rounds["ours"], rounds[peer], strict=True)
        ratio = statistics.median([(amount["ours"] / mine) / (amount[peer] / its) for mine, its in pairs])
        about = dict(commit=git_commit(), limits=self.limits, unit=unit)
        self.rows[name] = about | dict(ours=ours, peer=theirs, ratio=ratio, goal=goal, seconds=seconds) | more
        line = f"{name:12} {unit:12} ours {ours:12,.1f}   peer {theirs:12,.1f}   ratio {ratio:6.2f}"
        line += f" (goal {goal})" if goal else ""
        line += f"   share of the matmul limit {more['share']:.0%}" if more.get("share") else ""
        print(line, flush=True)


def measure_v5(bench):
    "V5 at two batch sizes, against the plain network and ViTMAE."
    path = bench.folder / "each.h5"
    write_each(path, bench)
    with h5py.File(path) as each:
        for batch in (16, 64):
            measure_v5_batch(bench, batch, each)


def measure_v5_batch(bench, batch, each):
    "V5 at one batch size; `each` is a file with a dataset per protein."
    settings, rng, sizes = dict(epochs=FOREVER, batch_size=batch), bench.rng, TINY_PEER_V5 if bench.tiny else {}
    run = bench.pretraining("v5", f"v5-{batch}", **settings)
    plain, vit = PlainV5(bench.dim, **sizes).train(), vitmae(bench.dim, **sizes).train()
    plain_optimizer, vit_optimizer = adamw(plain), adamw(vit)
    steps, in_a_row = Steps(run), 4  # a run takes thousands: the first one after another job finds no memory

    def read(i):
        return each[bench.ids[i]][:]

    def plain_step():
        indices = rng.choice(run.train_idx, batch, replace=False)
        update(plain, plain_optimizer, plain(*bench.padded(indices, read)))

    def vit_steps(in_bf16):
        for _ in range(in_a_row):
            patches = run.objective.data.__getitems__(rng.choice(run.train_idx, batch, replace=False))["patches"]
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                loss = vitmae_loss(vit, patches)
            update(vit, vit_optimizer, loss)

    jobs = dict(ours=partial(steps.take, in_a_row), plain=plain_step, vitmae=partial(vit_steps, False))
    if run.precision == "bf16":
        single = Steps(bench.pretraining("v5", f"v5-{batch}-float32", precision="float32", **settings))
        jobs |= dict(vitmae_bf16=partial(vit_steps, True), float32=partial(single.take, in_a_row))
    timing = in_turn(jobs, bench.options.rounds)
    flops = training_flops(run.model, bench.lengths[run.train_idx])
    parts = {run.precision: steps.parts()}
    if "float32" in jobs:
        parts["float32"] = single.parts()
    for precision, its in parts.items():
        words = ", ".join(f"{name} {seconds:.3f}" for name, seconds in its.items())
        print(f"v5, batch {batch}, {precision}, seconds of a step: {words}", flush=True)
    amount = dict.fromkeys(jobs, batch * in_a_row) | dict(plain=batch)
    vits = [name for name in jobs if name.startswith("vitmae")]
    peers = dict(plain=("plain", plain, 6), vitmae=(min(vits, key=timing[0].get), vit, {16: 2.5, 64: 3}[batch]))
    if "float32" in jobs:
        peers["float32"] = "float32", run.model, {16: 2, 64: 2.5}[batch]
    share = bench.share(flops * batch * in_a_row, timing[0]["ours"], run.precision)
    about = dict(batch=batch, precision=run.precision, share=share, gflop_per_protein=flops / 1e9)
    about |= dict(seconds_of_a_step=parts, our_parameters=run.n_params)
    for name, (peer, model, goal) in peers.items():
        theirs = dict(peer_precision="bf16" if peer.endswith("bf16") else "float32", peer_parameters=count(model))
        bench.add(f"v5 {name} {batch}", "proteins/s", amount, timing, peer, goal, **about, **theirs)


def measure_v2(bench):
    "A whole epoch of V2, long and short batches as they come, against steps of the padded network."
    batch, sizes = (4, TINY_PEER_V2) if bench.tiny else (32, {})
    settings = dict(epochs=FOREVER, batch_size=batch)
    run = bench.pretraining("v2", "v2", **settings)
    plain = PlainV2(bench.dim, **sizes).train()
    optimizer = adamw(plain)

    def plain_step():
        indices = bench.rng.choice(run.train_idx, batch, replace=False)
        update(plain, optimizer, plain(*bench.padded(indices, bench.store.__getitem__)))

    jobs = dict(ours=partial(Steps(run).take, len(run.train_dl)), plain=plain_step)
    if run.precision == "bf16":
        single = Steps(bench.pretraining("v2", "v2-float32", precision="float32", **settings))
        jobs["float32"] = partial(single.take, len(run.train_dl))
    timing = in_turn(jobs, min(bench.options.rounds, 3), warm=0)
    residues = float(bench.lengths[run.train_idx].sum())
    # a padded batch costs the same whoever is in it: scaled by the mean length
    amount = dict(ours=residues, float32=residues, plain=batch * residues / len(run.train_idx))
    flops = training_flops(run.model, bench.lengths[run.train_idx]) * len(run.train_idx)
    about = dict(batch=batch, precision=run.precision, peer_precision="float32")
    about["share"] = bench.share(flops, timing[0]["ours"], run.precision)
    for peer, goal in (("plain", 4.5), ("float32", 2.8)):
        if peer in jobs:
            bench.add(f"v2 {peer}", "residues/s", amount, timing, peer, goal, **about)


def measure_attention(bench):
    "Attention among the tokens of 64 proteins, of V5's encoder and decoder and of one long protein of V2."
    shapes = dict(encoder=(64, 12, 13, 64), decoder=(64, 8, 47, 32), v2=(1, 16, 450, 32))
    if bench.tiny:
        shapes = dict(encoder=(2, 2, 13, 8))
    for name, shape in shapes.items():
        inputs = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(3)]

        def both_ways(function, inputs=inputs):
            torch.autograd.grad(function(*inputs).sum(), inputs)

        jobs = dict(ours=partial(both_ways, partial(attention, mask=None)))
        jobs["torch"] = partial(both_ways, F.scaled_dot_product_attention)
        timing = in_turn(jobs, 5 * bench.options.rounds, warm=2)
        amount = dict(ours=shape[0], torch=shape[0])
        bench.add(f"attention {name}", "proteins/s", amount, timing, "torch", None, precision="bf16")


def write_each(path, bench, **options):
    "A file with a dataset per protein; `options` of h5py, and the dtype."
    dtype = options.pop("dtype", "f2")
    with h5py.File(path, "w") as f:
        for name in bench.ids:
            f.create_dataset(name, data=bench.store[name].astype(dtype), **options)


def write_flat(path, bench) -> np.memmap:
    "All rows in one file without any structure, opened to be read."
    shape = (int(bench.lengths.sum()), bench.dim)
    rows = np.memmap(path, "f2", "w+", shape=shape)
    rows[:] = np.concatenate([bench.store[i] for i in range(bench.n)])
    rows.flush()
    return np.memmap(path, "f2", "r", shape=shape)


def measure_store(bench):
    "Batches of random proteins, all in the page cache: into memory that is there, as training reads."
    draws = [bench.rng.choice(bench.n, DRAWN, replace=False) for _ in range(DRAWS)]
    size = sum(int(bench.lengths[draw].sum()) for draw in draws) * bench.dim * 2 / 1e9
    write_each(bench.folder / "hdf.h5", bench)
    write_each(bench.folder / "lzf.h5", bench, dtype="f4", compression="lzf")
    flat = write_flat(bench.folder / "flat.f16", bench)
    offsets = np.concatenate([[0], np.cumsum(bench.lengths)])
    room, keep = np.empty((MAX_LEN * DRAWN, bench.dim), np.float16), [None] * DRAWN

    def ours():
        for draw in draws:
            bench.store.batch(draw, room)

    def one_by_one(read):
        for draw in draws:
            for place, i in enumerate(draw):
                keep[place] = read(i)

    def dataset(file, i):
        return file[bench.ids[i]][:]

    def mapped(i):
        return np.array(flat[offsets[i] : offsets[i + 1]])

    with h5py.File(bench.folder / "hdf.h5") as hdf, h5py.File(bench.folder / "lzf.h5") as lzf:
        readers = dict(lzf=partial(dataset, lzf), hdf=partial(dataset, hdf), memmap=mapped)
        peers = {name: partial(one_by_one, read) for name, read in readers.items()}
        timing = in_turn(dict(ours=ours) | peers, 2 * bench.options.rounds)
    share = size / timing[0]["ours"] / (bench.limits["copy_gb_per_s"] / 2)
    note = "all in the page cache; bytes of float16 delivered"
    for peer, goal in (("lzf", 5), ("hdf", None), ("memmap", 0.7)):
        amount = {"ours": size, peer: size}
        bench.add(f"store {peer}", "GB/s", amount, timing, peer, goal, note=note, share_of_copy=share)


def random_pairs(bench) -> Pairs:
    "Pairs of random proteins with random labels."
    a, b = bench.rng.integers(0, bench.n, (2, 40 * bench.n))
    keep = a < b
    labels = bench.rng.integers(0, 2, keep.sum()).astype("int8")
    return Pairs(bench.ids, a[keep], b[keep], labels)


def ppi_run(bench):
    "A run of the classifier on a frozen V5 that was not trained."
    encoder = bench.pretraining("v5", "encoder", epochs=1)
    checkpoint = bench.folder / "encoder.safetensors"
    encoder.save_weights(checkpoint, encoder.state.weights(), dict(epoch=0, val_loss=0.0))
    pairs, changes = random_pairs(bench), dict(embed_dim=bench.sizes_v5.get("embed_dim", 768))
    changes |= dict(n_heads=4 if bench.tiny else 8, epochs=FOREVER)
    return PPITrainer(checkpoint, bench.store, pairs, random_split(pairs), bench.folder / "ppi", cpu=True, **changes)


def measure_ppi(bench):
    "Training pairs a second from cached tokens, against both proteins of every pair through the encoder."
    run, small, encoded = ppi_run(bench), 16, 32
    net, pairs, batch = run.net, run.pairs, run.config.batch_size
    inputs = EncoderInputs(net, bench.store, bench.mean.numpy(), bench.std.numpy())
    once_per_store = list(range(0, bench.n, max(1, bench.n // encoded)))[:encoded]

    def naive():
        chosen = bench.rng.choice(run.split.train, small)
        x, lengths = inputs.encode(net, np.concatenate([pairs.a[chosen], pairs.b[chosen]]).tolist())
        first = torch.arange(small)
        logits = net.score(net.whiten(x), lengths, first, first + small)
        loss = F.binary_cross_entropy_with_logits(logits, torch.as_tensor(pairs.label[chosen], dtype=torch.float32))
        run.acc.backward(loss)
        run.opt.step()
        run.opt.zero_grad()

    def encode():
        with torch.no_grad():
            inputs.encode(net, once_per_store)

    steps = 4
    timing = in_turn(dict(ours=partial(Steps(run).take, steps), naive=naive, encode=encode), bench.options.rounds)
    once = timing[0]["encode"] / encoded
    epoch = YEAST | dict(
        cached_s=YEAST["pairs"] * timing[0]["ours"] / (batch * steps),
        encode_once_s=YEAST["proteins"] * once,
        both_every_time_s=YEAST["pairs"] * timing[0]["naive"] / small,
        note="computed from the rates above",
    )
    amount, more = dict(ours=batch * steps, naive=small), dict(proteins_encoded_per_s=1 / once, epoch_of_yeast=epoch)
    bench.add("ppi", "pairs/s", amount, timing, "naive", 10, batch=batch, **more)


def peak_of_steps(options, precision) -> int:
    "Bytes that a process of its own has held at most, over some V5 steps of 64 proteins."
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder), measure=False)
        run = bench.pretraining("v5", "v5", epochs=FOREVER, batch_size=64, precision=precision)
        Steps(run).take(6)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_step_memory(bench):
    "Peak memory of training steps in both precisions."
    peaks = {}
    for precision in ("bf16", "float32"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[precision] = pool.submit(peak_of_steps, bench.options, precision).result()
    ratio = peaks["bf16"] / peaks["float32"]
    print(f"peak memory of V5 steps of 64: {peaks['bf16'] / 1e9:.2f} GB in bf16, {ratio:.2f} times float32's (goal 1)")
    bench.note("step-memory", dict(unit="bytes", ratio=ratio, goal=1, **peaks))


def measure_start(bench):
    "Import, and help on the command line, in processes of their own."
    commands = dict(import_protmae=["-c", "import protmae"], help=["-m", "protmae.cli", "--help"], nothing=["-c", ""])
    jobs = {
        name: partial(subprocess.run, [sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        for name, words in commands.items()
    }
    seconds, _ = in_turn(jobs, 5)
    print(f"start: import {seconds['import_protmae']:.2f} s, --help {seconds['help']:.2f} s (goals 0.2, 0.3)")
    goal = dict(import_protmae=0.2, help=0.3)
    bench.note("start", dict(unit="s", goal=goal, seconds=seconds))


def measure_memory(bench):
    "memory.py, whose figures stand in a file of their own; not at the tiny size."
    if bench.tiny:
        return
    out = Path(bench.options.out).with_name("memory.json")
    script = Path(__file__).with_name("memory.py")
    subprocess.run([sys.executable, str(script), "--out", str(out)], check=True)
    bench.note("memory", dict(see=out.name))


MEASURES = {
    "v5": measure_v5,
    "v2": measure_v2,
    "attention": measure_attention,
    "store": measure_store,
    "ppi": measure_ppi,
    "step-memory": measure_step_memory,
    "start": measure_start,
    "memory": measure_memory,
    **using.MEASURES,
}


def earlier_rows(options) -> dict:
    "Rows of an earlier run that are kept, where only some are measured now."
    out = Path(options.out)
    if set(options.rows) == set(ROWS) or not out.exists():
        return {}
    return json.loads(out.read_text()).get("rows", {})


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--proteins", type=int, default=128)
    parser.add_argument("--tiny", action="store_true", help="small models and stores: to see that it runs")
    parser.add_argument("--out", default="reports/bench/speed.json")
    return parser.parse_args()


def main():
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in ROWS:
            if name in options.rows:
                MEASURES[name](bench)
    about = dict(
        command="python " + " ".join(sys.argv),
        synthetic=True,
        proteins=bench.n,
        dim=bench.dim,
        tiny=options.tiny,
        limits=bench.limits,
    )
    write_json(options.out, about | dict(rows=earlier_rows(options) | bench.rows, provenance=provenance()))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
