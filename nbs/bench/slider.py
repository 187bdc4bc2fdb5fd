"""How long a slider of 01_explore_masking takes to answer for one protein: the kernel's side of it, per model.

    python nbs/bench/slider.py data/yeast.h5 data/runs/RUN2/best.safetensors data/runs/RUN5/best.safetensors [--threads 1] [--out reports/bench/slider.json]

Every move goes to a place that was not computed before, as when one drags. `mask` is the first thing to be seen, the mask over the embedding; `all` is
everything that follows: the model, the errors, the attention, made and handed to the front end. Medians, by the clock on the wall, which other work on
the machine slows down (the load is recorded), and in CPU time of this process, which it hardly does. `kept` is a move to a place that was computed
while nobody waited, as the slider's neighbours are.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from protmae.data.store import EmbeddingStore
from protmae.models.hub import load_model
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance
from protmae.viz.explorer import Explorer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("store")
p.add_argument("checkpoints", nargs="+")
p.add_argument("--out", default="reports/bench/slider.json")
p.add_argument("--residues", type=int, default=500, help="length of the protein: the nearest there is")
p.add_argument("--moves", type=int, default=15)
p.add_argument("--threads", type=int, default=1)
a = p.parse_args()
torch.set_num_threads(a.threads)
load, s = os.getloadavg()[0], EmbeddingStore(a.store)
i = int(np.argmin(abs(s.lengths - a.residues)))


def timed(f):
    t = time.perf_counter(), time.process_time()
    f()
    return [1000 * (b - a) for a, b in zip(t, (time.perf_counter(), time.process_time()))]


res = {}
for c in a.checkpoints:
    m, meta = load_model(c)
    e = Explorer({"m": (m, meta)}, s, protein=i)
    settle = e.settle
    e._ahead = lambda: None
    got = dict(mask=[], all=[], kept=[])
    ratios = np.round(np.linspace(0.05, 0.95, 19), 2)
    for k in range(a.moves + 2):  # two to warm up
        e.settle = lambda: None
        e._later = lambda *_: True
        e.kept.clear()
        r = float(ratios[(7 * k + 1) % 19])
        first = timed(lambda: setattr(e.ratio, "value", r))
        then = timed(flush_pending_losses)
        e.settle = flush_pending_losses
        e._later = lambda *_: False
        away = float(ratios[(7 * k + 2) % 19])
        e.look(away)
        third = timed(lambda: setattr(e.ratio, "value", away))
        if k > 1:
            got["mask"].append(first)
            got["all"].append([x + y for x, y in zip(first, then)])
            got["kept"].append(third)
    res[meta["arch"]] = {
        what: dict(zip(("wall_ms", "cpu_ms"), np.median(x, 0).tolist())) | dict(slowest_wall_ms=max(w for w, _ in x))
        for what, x in got.items()
    } | dict(parameters=sum(q.numel() for q in m.parameters()))
    for what in got:
        print(
            f"{meta['arch']} {what}: {res[meta['arch']][what]['wall_ms']:.0f} ms ({res[meta['arch']][what]['cpu_ms']:.0f} ms CPU)"
        )
write_json(
    a.out,
    dict(
        what="answer of the slider of 01_explore_masking",
        command=" ".join(
            ["python nbs/bench/slider.py", *(Path(w).name if w.startswith("/") else w for w in sys.argv[1:])]
        ),
        protein=s.ids[i],
        residues=int(s.lengths[i]),
        threads=a.threads,
        moves=a.moves,
        models=res,
        load_average_before=load,
        provenance=provenance(),
    ),
)
