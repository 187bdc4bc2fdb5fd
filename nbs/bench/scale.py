"""What a protein costs at each stage on this machine: embedding, pooling, a V5 and a V2 training step; time and bytes.

    python nbs/bench/scale.py data/yeast.h5 [--model unirep] [--out reports/bench/scale.json]
    python nbs/bench/scale.py data/yeast.h5 --out reports/gpu/scale.json     # on a machine with a GPU
    python nbs/bench/scale.py data/demo.h5 --tiny --out /tmp/scale.json      # to see that it runs

nbs/bench/scale.ipynb multiplies these. A seeded draw of proteins from a real store, full-size models, batches of the
default size. The proteins are embedded anew with `--model`, as `protmae embed` does it; pooling, V5 and V2 run on a
small store of the drawn proteins. Each rate is given by the clock on the wall, which other work on the machine slows
down (the load is recorded), and on a CPU also by the CPU time this process got (`_per_cpu_s`), which it hardly does.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from protmae.data.patches import PatchCache
from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create
from protmae.embed.embedders import get_embedder
from protmae.embed.run import embedder_batches
from protmae.models.v2 import TINY_V2
from protmae.models.v5 import TINY_V5
from protmae.training.pretrain import PretrainTrainer
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance


def clocks() -> np.ndarray:
    "The wall's clock and this process's CPU time, once a GPU has done its work."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def seconds_of(function) -> np.ndarray:
    "By both clocks."
    started = clocks()
    function()
    return clocks() - started


def rates(seconds, **amounts) -> dict:
    "Rates by both clocks; CPU time says nothing of a GPU's work."
    units = ("s",) if torch.cuda.is_available() else ("s", "cpu_s")
    return {
        f"{name}_per_{unit}": float(amount / each)
        for name, amount in amounts.items()
        for unit, each in zip(units, seconds, strict=False)
    }


def embed_all(embedder, sequences):
    for batch in embedder_batches(embedder, sequences):
        embedder.embed([sequences[i] for i in batch])


def measure_embedding(name, sequences) -> dict:
    "Residues per second of a language model, behind one protein that warms up."
    embedder = get_embedder(name)
    embedder.embed(sequences[:1])
    seconds, residues = seconds_of(partial(embed_all, embedder, sequences)), sum(map(len, sequences))
    print(f"embed {embedder.name}: {residues / seconds[0]:,.0f} residues/s")
    about = dict(model=embedder.name, dim=embedder.dim, proteins=len(sequences), residues=residues)
    return rates(seconds, residues=residues) | about


def small_store(path, source, chosen) -> EmbeddingStore:
    "The chosen proteins of a store in one of their own."
    ids, sequences = ([texts[i] for i in chosen] for texts in (source.ids, source.sequences))
    create(path, ids, sequences, source.dim, source.model, source.layer, source.lengths[chosen])
    with StoreWriter(path) as writer:
        writer.write((place, source[i]) for place, i in enumerate(chosen))
    return EmbeddingStore(path)


def measure_pooling(store) -> dict:
    "Time and bytes of the patch cache."
    started = clocks()
    cache = PatchCache(store)
    seconds, size, residues = clocks() - started, cache.path.stat().st_size, int(store.lengths.sum())
    print(f"patches: {len(store) / seconds[0]:,.0f} proteins/s, {size / len(store):,.0f} bytes a protein")
    sizes = dict(bytes_per_protein=size / len(store), patches_per_protein=float(cache.counts.mean()))
    return rates(seconds, proteins=len(store), residues=residues) | sizes


def store_bytes(store) -> dict:
    "What a store takes: rows, and the rest."
    rows = 2 * store.dim * int(store.lengths.sum())
    rest = (store.path.stat().st_size - rows) / len(store)
    return dict(bytes_per_residue=2 * store.dim, bytes_per_protein=rest, dim=store.dim)


def measure_training(arch, store, out, steps, sizes) -> dict:
    "Proteins and residues per second over some steps behind one that warms up."
    run = PretrainTrainer(arch, store, out, sizes=sizes)
    run.model.train()
    found = []
    for batch in itertools.islice(run.train_dl, steps + 1):
        seconds = seconds_of(partial(run.train_step, batch))
        found.append((len(batch["lengths"]), int(batch["lengths"].sum()), *seconds))
    # the steps' proteins differ in length: sums, not medians
    proteins, residues, *seconds = np.sum(found[1:], axis=0)
    figures = rates(seconds, proteins=proteins, residues=residues)
    print(f"{arch}: {figures['proteins_per_s']:,.2f} proteins/s, {figures['residues_per_s']:,.0f} residues/s")
    return figures | dict(batch_size=run.config.batch_size, steps=len(found) - 1, parameters=run.n_params)


def measure_all(options) -> dict:
    "Every stage."
    source = EmbeddingStore(options.store)
    draw = np.random.default_rng(0).choice(len(source), options.proteins, replace=False)
    chosen = np.sort(draw)
    sequences = [source.sequences[i] for i in chosen[: options.embed_proteins]]
    found = dict(
        what="cost per protein of each stage",
        command=" ".join(["python nbs/bench/scale.py", *sys.argv[1:]]),
        source=f"{options.proteins} proteins drawn from {Path(options.store).name} ({len(source):,} proteins)",
        mean_length=float(source.lengths.mean()),
        embed=measure_embedding(options.model, sequences),
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        store = small_store(folder / "store.h5", source, chosen)
        found |= dict(patches=measure_pooling(store), store=store_bytes(store))
        for arch, steps, tiny in (("v5", options.v5_steps, TINY_V5), ("v2", options.v2_steps, TINY_V2)):
            sizes = tiny if options.tiny else None
            found[arch] = measure_training(arch, store, folder / arch, steps, sizes)
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--model", default="unirep")
    parser.add_argument("--out", default="reports/bench/scale.json")
    parser.add_argument("--proteins", type=int, default=400)
    parser.add_argument("--embed-proteins", type=int, default=24)
    parser.add_argument("--v5-steps", type=int, default=12)
    parser.add_argument("--v2-steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="few proteins, small models: to see that it runs")
    options = parser.parse_args()
    if options.tiny:
        options.proteins, options.embed_proteins, options.v5_steps, options.v2_steps = 60, 2, 2, 1
    return options


def main():
    options = parse()
    load = os.getloadavg()[0]
    write_json(options.out, measure_all(options) | dict(load_average_before=load, provenance=provenance()))
    print(options.out)


if __name__ == "__main__":
    main()
