"""What one GPU makes of V5, V2, embedding and PPI heads: honest steps first, then times, then a rehearsal of the study.

    python nbs/bench/gpu.py [--carry .carry] [--out reports/gpu/bench.json] [--seconds 420]
    python nbs/bench/gpu.py --tiny                           # to see that it runs, on any machine

protmae must be importable: `pip install -e .`, or PYTHONPATH=. where nothing may be installed.

Parts come in the order of their worth, each is written as soon as it is measured, and a part that fails is named with
its error while the others go on. No part starts that would not end in time. Data are SYNTHETIC (lengths from the yeast
proteome's histogram) but in the rehearsal, which reads what `gpu_study.py pack` wrote to --carry. MFU counts the
multiplications of matrices that real tokens need (protmae.models.flops), over the card's bf16 matmul of the same run
and over --peak.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from functools import partial
from importlib import util
from pathlib import Path

import gpu_study
import numpy as np
import torch
from loop_heads import HeadLoop
from loops import Data, PretrainLoop
from memory import TINY_SIZES, lengths_of, names, real_store, sparse_store
from peers import TINY_PEER_V2, TINY_PEER_V5, PlainV2, PlainV5, adamw, update, vitmae, vitmae_loss

from protmae.core import MAX_LEN, N_PATCHES, PATCH_SIZE, seed_for
from protmae.data.store import EmbeddingStore
from protmae.embed.language_models import LanguageModel
from protmae.embed.run import embedder_batches
from protmae.models.classifier import IdentityEncoder
from protmae.models.flops import training_flops
from protmae.models.hub import build
from protmae.models.v5 import MAEEncoder
from protmae.ppi.config import config_for
from protmae.ppi.pairs import Pairs
from protmae.ppi.splits import make_split
from protmae.ppi.training import make_classifier
from protmae.training.pretrain import PretrainTrainer
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

TINY_V2 = dict(embed_dim=64, num_layers=1, nhead=4, ff_dim=128)
MANY = 20_000  # proteins that epochs are computed for
PAIRS = 22_600_000  # all pairs of the yeast proteome, about
REHEARSED = ("embedding", "failed", "seconds", "pretraining", "results", "splits")


def wait():
    "For the card to have done its work."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of_each(function, count, warm=3) -> float:
    "Seconds of one call, mean over `count` in a row."
    for _ in range(warm):
        function()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        function()
    wait()
    return (time.perf_counter() - started) / count


class Steps:
    "Steps of the library's trainer; batches as its own loader brings them."

    def __init__(self, run):
        self.run, self.batches = run, iter(())
        run.model.train()

    def next_batch(self):
        with suppress(StopIteration):
            return next(self.batches)
        self.batches = iter(self.run.train_dl)
        return next(self.batches)

    def take(self):
        "One step."
        self.run.train_step(self.next_batch())


def norm_of(tensors) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


class Bench:
    "Stores, clocks, and what was found so far."

    def __init__(self, options):
        self.options, self.tiny, self.started = options, options.tiny, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_gpu, self.rng = self.device.type == "cuda", np.random.default_rng(0)
        self.dim = 96 if self.tiny else 960
        self.sizes = dict(v5=TINY_SIZES, v2=TINY_V2) if self.tiny else dict(v5={}, v2={})
        self.found = dict(
            command="python nbs/bench/gpu.py " + " ".join(sys.argv[1:]),
            synthetic=True,
            tiny=self.tiny,
            dim=self.dim,
            peak_tflops=options.peak,
            parts={},
            failed={},
            provenance=provenance(),
        )

    def make_stores(self, folder):
        "Patches for V5, residues for V2."
        self.folder = folder
        self.v5_lengths = sparse_store(folder / "v5.h5", self.options.proteins, self.dim, self.rng)
        self.v2_lengths = np.maximum(lengths_of(self.options.v2_proteins, self.rng), PATCH_SIZE + 1)
        real_store(folder / "v2.h5", self.v2_lengths, self.dim, self.rng)
        self.stores = {arch: EmbeddingStore(folder / f"{arch}.h5") for arch in ("v5", "v2")}
        self.say("stores are there")

    # ---- parts

    def seconds(self) -> float:
        "Since the beginning."
        return time.perf_counter() - self.started

    def say(self, text):
        print(f"{self.seconds():5.0f} s  {text}", flush=True)

    def part(self, name, measure, needs=5.0):
        "Measure, say and write."
        if self.options.only and not any(word in name for word in self.options.only.split(",")):
            return
        if self.seconds() + needs > self.options.seconds:
            limit = f"{self.seconds():.0f} of {self.options.seconds:g} s were over, it needs {needs:g}"
            self.found["failed"][name] = f"not started: {limit}"
            print(name, self.found["failed"][name], flush=True)
            return
        try:
            self.found["parts"][name] = figures = self.measured(measure)
            self.say(f"{name}: " + json.dumps(figures, default=str))
        except BaseException as e:
            self.found["failed"][name] = f"{type(e).__name__}: {str(e)[:600]}"
            traceback.print_exc()
            if isinstance(e, KeyboardInterrupt):
                raise
        finally:
            self.clean_up()
            write_json(self.options.out, self.found | dict(seconds=self.seconds()))

    def measured(self, measure) -> dict:
        "The figures of a part, its time and memory."
        started = time.perf_counter()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        figures = measure(self)
        wait()
        if self.is_gpu:
            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return figures | dict(part_seconds=time.perf_counter() - started)

    def clean_up(self):
        "Forget what was compiled, give the card's memory back."
        torch._dynamo.reset()
        if not self.is_gpu:
            return
        try:
            torch.cuda.set_sync_debug_mode(0)
            torch.cuda.empty_cache()
        except Exception as e:
            print("the device does not answer any more:", e)

    # ---- figures

    def mfu(self, operations) -> dict:
        "Operations per second, and their share of the limits."
        limit = self.found["parts"].get("machine", {}).get("bf16_matmul_tflops")
        tflops = operations / 1e12
        return dict(
            tflops=tflops,
            mfu_of_measured=tflops / limit if limit else None,
            mfu_of_stated=tflops / self.options.peak if self.is_gpu else None,
        )

    def v5_rates(self, batch, seconds, model, proteins) -> dict:
        "What follows from the seconds of a step."
        flops = training_flops(model, self.v5_lengths[proteins])
        figures = dict(batch=batch, step_ms=1e3 * seconds, proteins_per_s=batch / seconds)
        figures |= dict(gflop_per_protein=flops / 1e9)
        figures["minutes_for_100_epochs_of_20000"] = 100 * -(-MANY // batch) * seconds / 60
        return figures | self.mfu(flops * batch / seconds)

    def v2_rates(self, seconds, lengths, model) -> dict:
        "What follows from the seconds of an epoch."
        rate = lengths.sum() / seconds
        figures = dict(batch=32, residues_per_s=rate, proteins_per_s=len(lengths) / seconds)
        figures["computed_from"] = "residues per second"
        figures["minutes_for_60_epochs_of_20000"] = 60 * MANY * lengths.mean() / rate / 60
        return figures | self.mfu(training_flops(model, lengths) * len(lengths) / seconds)

    # ---- runs

    def library_run(self, arch, batch, **more) -> PretrainTrainer:
        "A run of the library's trainer."
        folder = tempfile.mkdtemp(prefix=f"{arch}-{batch}-", dir=self.folder)
        more = dict(compiled=False) | more
        more |= dict(sizes=self.sizes[arch], epochs=100_000, batch_size=batch, save_minutes=1e9)
        return PretrainTrainer(arch, self.stores[arch], Path(folder) / "run", **more)

    def v5_data(self) -> Data:
        "Random patches on the device."
        chosen = np.flatnonzero(self.v5_lengths > PATCH_SIZE)
        patches = torch.randn(len(self.v5_lengths), N_PATCHES, self.dim, device=self.device)
        return Data(self.v5_lengths, self.dim, self.device, chosen, chosen[:64], patches=patches)

    def v5_loop(self, batch, steps, data) -> PretrainLoop:
        "A run of loops.py with enough epochs for so many steps."
        epochs = -(-(steps + 20) // -(-len(data.train_idx) // batch)) + 1
        return PretrainLoop("v5", "v5", data, self.device, sizes=self.sizes["v5"], epochs=epochs, batch_size=batch)


def measure_machine(bench) -> dict:
    "What a matmul and a copy reach."
    n, size = (256, 2**18) if bench.tiny else (8192, 2**30)
    one, two = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (size,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    matmul = seconds_of_each(partial(torch.matmul, one, two), 20)
    copy = seconds_of_each(partial(target.copy_, source), 20)
    return dict(bf16_matmul_tflops=2 * n**3 / matmul / 1e12, copy_gb_per_s=2 * size / copy / 1e9)


# ---- honest steps


def find_waits(step) -> dict:
    "Where steps wait for the device; `waits` is empty where they do not."
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            step()
        return dict(waits=[])
    except RuntimeError as e:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        places = {f"{warning.filename.split('/')[-1]}:{warning.lineno}" for warning in caught}
        return dict(error=str(e)[:300], waits=sorted(places))
    finally:
        torch.cuda.set_sync_debug_mode(0)


def gradients_on(device, model, run, batch) -> tuple:  # loss, name -> gradient
    "Loss and gradients of a batch: in bf16 on a GPU, in float32 on a CPU."
    model = model.to(device).train()
    model.zero_grad()
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        terms, _ = run.objective.loss(model, batch, run.config, seed_for(0, "mask", 0))
    loss = sum(mean for mean, _ in terms)
    loss.float().backward()
    gradients = {n: p.grad.float().cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def compare_gradients(bench, arch, run) -> dict:
    "A batch on the device beside the same on the CPU."
    torch.manual_seed(1)
    model = build(arch, input_dim=bench.dim, **bench.sizes[arch])
    batch = run.objective.data.__getitems__(run.train_idx[: 16 if arch == "v5" else 4].tolist())
    loss, gradients = gradients_on(bench.device, model, run, batch)
    cpu_loss, expected = gradients_on(torch.device("cpu"), model, run, batch)
    errors = {name: gradients[name] - value for name, value in expected.items()}
    relative = {name: (errors[name].norm() / v.norm().clamp(min=1e-12)).item() for name, v in expected.items()}
    worst = max(relative, key=relative.get)
    return dict(
        loss=loss,
        loss_cpu_float32=cpu_loss,
        gradient_error=norm_of(errors.values()) / norm_of(expected.values()),
        worst_weights=worst,
        worst_error=relative[worst],
    )


def measure_honesty(bench, arch) -> dict:
    "A step of the library's trainer that may not wait for the device, and gradients beside float32 on the CPU."
    run, found = bench.library_run(arch, 16), {}
    steps = Steps(run)
    for _ in range(4):
        steps.take()
    run.flush_pending_losses()
    if bench.is_gpu:
        wait()
        found = find_waits(steps.take)
    run.flush_pending_losses()
    return found | compare_gradients(bench, arch, run)


# ---- times


def measure_v5_library(bench, batch, steps=20, **more) -> dict:
    "Steps of the library's trainer."
    run = bench.library_run("v5", batch, **more)
    seconds = seconds_of_each(Steps(run).take, steps, 12 if more else 4)
    run.flush_pending_losses()
    return bench.v5_rates(batch, seconds, run.acc.unwrap_model(run.model), run.train_idx)


def measure_v5_graph(bench, batch, steps=40) -> dict:
    "Steps of loops.py: CUDA graphs."
    data = bench.v5_data()
    run = bench.v5_loop(batch, steps, data)
    step = partial(run.enqueue, batch, N_PATCHES)
    wait()
    started = time.perf_counter()
    with run.lane.use():
        for _ in range(4):
            step()
        wait()
        until_captured = time.perf_counter() - started
        seconds = seconds_of_each(step, steps, 2)
    rates = bench.v5_rates(batch, seconds, run.model, data.train_idx)
    return rates | dict(seconds_until_captured=until_captured)


def measure_v5_streams(bench, models, batch=16, steps=40) -> dict:
    "Several models side by side."
    data = bench.v5_data()
    runs = [bench.v5_loop(batch, steps, data) for _ in range(models)]

    def step_of_each():
        for run in runs:
            with run.lane.use():
                run.enqueue(batch, N_PATCHES)

    wait()
    for _ in range(4):
        step_of_each()
    wait()
    seconds = seconds_of_each(step_of_each, steps, 2)
    figures = dict(models=models, batch=batch, ms_for_a_step_of_each=1e3 * seconds)
    return figures | dict(ms_per_step=1e3 * seconds / models, proteins_per_s=batch * models / seconds)


def measure_v2_library(bench, layout=None) -> dict:
    "An epoch of the library's trainer."
    run = bench.library_run("v2", 32)
    model, count = run.acc.unwrap_model(run.model), len(run.train_dl)
    model.layout = layout
    step = Steps(run).take
    for _ in range(count):
        step()
    seconds = seconds_of_each(step, count, 0)
    run.flush_pending_losses()
    return bench.v2_rates(count * seconds, bench.v2_lengths[run.train_idx], model)


def measure_v2_graph(bench) -> dict:
    "Epochs of loops.py: four until all widths are captured, then two that are timed."
    store, device = bench.stores["v2"], bench.device
    table = torch.from_numpy(np.concatenate([store[i] for i in range(len(store))])).to(device)
    everyone = np.arange(len(store))
    mean, std = torch.zeros(bench.dim, device=device), torch.ones(bench.dim, device=device)
    data = Data(bench.v2_lengths, bench.dim, device, everyone, everyone[:32], table=table, mean=mean, std=std)
    run = PretrainLoop("v2", "v2", data, device, sizes=bench.sizes["v2"], epochs=6, batch_size=32)
    wait()
    with run.lane.use():
        for epoch, shapes in enumerate(run.shapes):
            if epoch == 4:
                wait()
                started = time.perf_counter()
            for shape in shapes:
                run.enqueue(*shape)
        wait()
    seconds = (time.perf_counter() - started) / 2
    return bench.v2_rates(seconds, bench.v2_lengths, run.model) | dict(graphs=len(run.graphs or ()))


def measure_head(bench) -> dict:
    "Steps of a PPI head on patch means."
    n, count, batch = (150, 3000, 64) if bench.tiny else (3000, 30_000, 256)
    lengths = np.maximum(lengths_of(n, bench.rng), PATCH_SIZE + 1)
    a, b = np.triu_indices(n, 1)
    chosen = bench.rng.permutation(len(a))[:count]
    labels = bench.rng.integers(0, 2, len(chosen)).astype("i1")
    pairs = Pairs([f"P{i}" for i in range(n)], a[chosen], b[chosen], labels)
    data = Data(lengths, bench.dim, bench.device, patches=torch.randn(n, N_PATCHES, bench.dim, device=bench.device))
    config, split = config_for(epochs=3, batch_size=batch), make_split(pairs, "random", 0)
    make = partial(IdentityEncoder, bench.dim)
    head = HeadLoop("ppi", data, pairs, split, config, make, np.arange(n), bench.device)
    wait()
    with head.lane.use():
        head.prepare()
        seconds = seconds_of_each(partial(head.enqueue, batch), 10 if bench.tiny else 60, 4)
    return dict(batch=batch, step_ms=1e3 * seconds, pairs_per_s=batch / seconds)


def measure_prediction(bench) -> dict:
    "Scores of random pairs from tokens on the device."
    n, size, width = (200, 128, 96) if bench.tiny else (6000, 4096, 768)
    device = bench.device
    lengths = torch.as_tensor(np.maximum(lengths_of(n, bench.rng), PATCH_SIZE + 1)).to(device)
    net = make_classifier(MAEEncoder(bench.dim, width, 1), config_for(n_heads=8)).to(device).eval()
    table, first = torch.randn(n, N_PATCHES + 1, width, device=device).half(), torch.arange(size, device=device)

    @torch.no_grad()
    def score():
        index = torch.randint(n, (2 * size,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bench.is_gpu):
            return net.score(table[index].float(), lengths[index], first, first + size)

    seconds = seconds_of_each(score, 3 if bench.tiny else 40)
    return dict(
        tile=size,
        pairs_per_s=size / seconds,
        seconds_for_22_600_000_pairs=PAIRS * seconds / size,
        computed_from="pairs per second",
    )


def random_esmc(tiny) -> LanguageModel:
    "ESM-C at the size of its 300 M model, with random weights."
    import transformers

    width, layers = (64, 2) if tiny else (960, 30)
    sizes = dict(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers)
    heads = dict(num_attention_heads=width // 64, num_key_value_heads=width // 64)
    model = transformers.EsmcModel(transformers.EsmcConfig(**sizes, **heads))
    return LanguageModel("random/esmc_300m", model=model, tokenizer=transformers.EsmcTokenizer())


def measure_language_model(bench) -> dict:
    "Residues a second through ESM-C, from sequences to arrays on the host, and what the products of matrices allow."
    n = 8 if bench.tiny else 1000
    embedder = random_esmc(bench.tiny)
    _, sequences = names(n, lengths_of(n, bench.rng), bench.rng)
    batches = [[sequences[i] for i in batch] for batch in embedder_batches(embedder, sequences)]

    def embed():
        for batch in batches:
            embedder.embed(batch)

    rate = sum(map(len, sequences)) / seconds_of_each(embed, 1, 1)
    flops = 2 * sum(weight.numel() for weight in embedder.model.layers.parameters() if weight.ndim == 2)
    return dict(proteins=n, residues_per_s=rate) | bench.mfu(rate * flops)


def measure_rehearsal(bench) -> dict:
    "The study with two epochs of everything, on one seed."
    options = bench.options
    out, minutes = Path(options.out).parent / "rehearsal", min(1.6, (options.seconds - bench.seconds()) / 60)
    words = f"--head-epochs 2 --v5-epochs 2 --v2-epochs 2 --keep 0,2 --seeds 0 --minutes {minutes}".split()
    words += ["--tiny"] * bench.tiny
    gpu_study.main(["run", str(options.carry or bench.folder), "--out", str(out), *words])
    study = json.loads((out / "study.json").read_text())
    return {name: study[name] for name in REHEARSED}


def measure_peer(bench, kind, batch) -> dict:
    "Steps as people would write them."
    tiny_v5, tiny_v2 = (TINY_PEER_V5, TINY_PEER_V2) if bench.tiny else ({}, {})
    lengths = torch.as_tensor(bench.rng.choice(bench.v5_lengths, batch)).to(bench.device).clamp(min=PATCH_SIZE + 1)
    makers = {"plain": partial(PlainV5, **tiny_v5), "vitmae": partial(vitmae, **tiny_v5)}
    makers["v2 padded"] = partial(PlainV2, **tiny_v2)
    model = makers[kind](bench.dim).to(bench.device).train()
    width = N_PATCHES if kind == "vitmae" else MAX_LEN
    x = torch.randn(batch, width, bench.dim, device=bench.device)
    loss_of = partial(vitmae_loss, model, x) if kind == "vitmae" else partial(model, x, lengths)
    optimizer = adamw(model)

    def step():
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.is_gpu):
            loss = loss_of()
        update(model, optimizer, loss)

    seconds = seconds_of_each(step, 2 if bench.tiny else 10, 2)
    return dict(batch=batch, step_ms=1e3 * seconds, proteins_per_s=batch / seconds)


# ---- all parts


def plan(bench) -> list:  # of (name, function of the bench, seconds it needs)
    "The parts, in the order of their worth."
    tiny, options, later = bench.tiny, bench.options, (64,) if bench.tiny else (64, 256, 1024)
    parts = [("machine", measure_machine, 5)]
    parts += [(f"honest {arch}", partial(measure_honesty, arch=arch), 5) for arch in ("v5", "v2")]
    parts += [("v5 graph 16", partial(measure_v5_graph, batch=16), 5)]
    if options.carry or tiny:
        parts += [("rehearsal", measure_rehearsal, 40)]
    parts += [(f"v5 graph {batch}", partial(measure_v5_graph, batch=batch), 5) for batch in later]
    parts += [("v5 streams 4", partial(measure_v5_streams, models=2 if tiny else 4), 5)]
    parts += [("v5 library 16", partial(measure_v5_library, batch=16), 5)]
    parts += [("ppi training", measure_head, 5), ("v2 graph", measure_v2_graph, 5)]
    parts += [("predicting", measure_prediction, 5)]
    if util.find_spec("transformers") and util.find_spec("transformers.models.esmc"):  # new versions have it
        parts += [("embedding, ESM-C 300M with random weights", measure_language_model, 20)]
    parts += [(f"v5 library {batch}", partial(measure_v5_library, batch=batch), 5) for batch in later]
    parts += [("v2 library", measure_v2_library, 5), ("v5 streams 2", partial(measure_v5_streams, models=2), 5)]
    if bench.is_gpu:
        parts += [("v5 library 16, compiled", partial(measure_v5_library, batch=16, compiled=True), 75)]
        parts += [("v2 library, packed", partial(measure_v2_library, layout="flex"), 60)]
    if options.peers:
        peers = (("plain", 64), ("vitmae", 64), ("v2 padded", 4 if tiny else 32))
        parts += [(f"peer {kind} {batch}", partial(measure_peer, kind=kind, batch=batch), 5) for kind, batch in peers]
    return parts


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="default: reports/gpu/bench.json, and for --tiny a temporary folder")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--proteins", type=int, default=4000)
    parser.add_argument("--v2-proteins", type=int, default=600)
    parser.add_argument(
        "--peak", type=float, default=989.4, help="the maker's dense bf16 TFLOP/s (989.4: H100 SXM and H200)"
    )
    parser.add_argument("--seconds", type=float, default=420, help="the whole of it")
    parser.add_argument("--carry", type=Path, help="for the rehearsal")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", default="", help="parts whose name contains one of these, comma between")
    options = parser.parse_args()
    if options.tiny:
        options.proteins, options.v2_proteins = 200, 60
    folder = tempfile.mkdtemp() if options.tiny else "reports/gpu"
    options.out = options.out or f"{folder}/bench.json"
    return options


def main():
    options = parse()
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as folder:
        bench.make_stores(Path(folder))
        for name, measure, needs in plan(bench):
            bench.part(name, measure, needs)
    bench.say(f"written to {options.out}; failed: {bench.found['failed'] or 'nothing'}")


if __name__ == "__main__":
    main()
