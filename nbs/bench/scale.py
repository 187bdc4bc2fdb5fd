"""What a protein costs at each stage on this machine: embedding, pooling, a V5 and a V2 training step; time and bytes. nbs/scale.ipynb multiplies these.

    python nbs/bench/scale.py data/yeast.h5 [--model unirep] [--out reports/bench/scale.json]        # on a GPU machine: --out reports/gpu/scale.json

A seeded draw of proteins from a real store, full-size models, batches of the default size. The proteins are embedded anew with
`--model`, as `protmae embed` does it; pooling, V5 and V2 run on a small store of the drawn proteins. Each rate is given by the clock on the wall, which other
work on the machine slows down (the load is recorded), and on a CPU also by the CPU time this process got (`_per_cpu_s`), which it hardly does.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from protmae.data.patches import PatchCache
from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create
from protmae.embed.run import _limits, get_embedder, token_batches
from protmae.training.pretrain import PretrainTrainer
from protmae.training.trainer import train_step
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("store")
p.add_argument("--model", default="unirep")
p.add_argument("--out", default="reports/bench/scale.json")
p.add_argument("--proteins", type=int, default=400)
p.add_argument("--embed-proteins", type=int, default=24)
p.add_argument("--v5-steps", type=int, default=12)
p.add_argument("--v2-steps", type=int, default=3)
a = p.parse_args()
load = os.getloadavg()[0]
big = EmbeddingStore(a.store)
pick = np.sort(np.random.default_rng(0).choice(len(big), a.proteins, replace=False))
sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def now():
    sync()
    return np.array([time.perf_counter(), time.process_time()])


def rates(t, **n):
    "Rates by both clocks; CPU time says nothing of a GPU's work."
    return {
        f"{k}_per_{s}": v / x
        for k, v in n.items()
        for s, x in zip(("s", "cpu_s")[: 1 if torch.cuda.is_available() else 2], t.tolist())
    }


def steps(run, n):
    "Proteins and residues per second over n steps behind one that warms up."
    run.model.train()
    times = []
    for b in itertools.islice(run.train_dl, n + 1):
        t = now()
        train_step(run, b)
        t = now() - t
        times.append((len(b["lengths"]), int(b["lengths"].sum()), t))
        run.step += 1
    n, res, t = map(sum, zip(*times[1:]))  # the steps' proteins differ in length: sums, not medians
    return rates(t, proteins=n, residues=res) | dict(batch_size=run.config["batch_size"], steps=len(times) - 1)


res = dict(
    what="cost per protein of each stage",
    command=" ".join(["python nbs/bench/scale.py", *sys.argv[1:]]),
    source=f"{a.proteins} proteins drawn from {Path(a.store).name} ({len(big):,} proteins)",
    mean_length=float(big.lengths.mean()),
)
e = get_embedder(a.model)
seqs = [big.sequences[i] for i in pick[: a.embed_proteins]]
batches = token_batches([len(s) for s in seqs], **_limits(e))
e.embed(seqs[:1])
t = now()
for b in batches:
    e.embed([seqs[i] for i in b])
t = now() - t
n = sum(map(len, seqs))
res["embed"] = rates(t, residues=n) | dict(model=e.name, dim=e.dim, proteins=len(seqs), residues=n)
print(f"embed {e.name}: {n / t[0]:,.0f} residues/s")
with tempfile.TemporaryDirectory() as d:
    d = Path(d)
    create(
        d / "s.h5",
        [big.ids[i] for i in pick],
        [big.sequences[i] for i in pick],
        big.dim,
        model=big.model,
        layer=big.layer,
    )
    with StoreWriter(d / "s.h5") as w:
        w.write((j, big[i]) for j, i in enumerate(pick))
    s = EmbeddingStore(d / "s.h5")
    t = now()
    c = PatchCache(s)
    t = now() - t
    residues = int(s.lengths.sum())
    cache = c.path.stat().st_size
    res["patches"] = rates(t, proteins=len(s), residues=residues) | dict(
        bytes_per_protein=cache / len(s), patches_per_protein=float(c.counts.mean())
    )
    res["store"] = dict(
        bytes_per_residue=2 * s.dim,
        bytes_per_protein=(s.path.stat().st_size - 2 * s.dim * residues) / len(s),
        dim=s.dim,
    )
    print(f"patches: {len(s) / t[0]:,.0f} proteins/s, {cache / len(s):,.0f} bytes a protein")
    for arch, n in (("v5", a.v5_steps), ("v2", a.v2_steps)):
        r = PretrainTrainer(arch, s, d / arch)
        res[arch] = steps(r, n) | dict(parameters=r.n_params)
        print(f"{arch}: {res[arch]['proteins_per_s']:,.2f} proteins/s, {res[arch]['residues_per_s']:,.0f} residues/s")
        del r
write_json(a.out, res | dict(load_average_before=load, provenance=provenance()))
