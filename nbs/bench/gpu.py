"""V5 and V2 pretraining on one GPU: step times, proteins/s, MFU, and what whole runs would take. Under 8 minutes on an H100-class card.

    python nbs/bench/gpu.py [--out reports/gpu/bench.json]          # needs torch, h5py and accelerate; the repo's root is found by itself
    python nbs/bench/gpu.py --tiny --out /tmp/bench.json            # to see that it runs, on any machine

Data are SYNTHETIC, lengths from the yeast proteome's histogram. V5 reads a patch cache of 20,000 proteins; V2 reads real random residues of fewer
(--v2-proteins), and its 60 epochs of 20,000 proteins are computed from residues/s (said so in the JSON). Steps are `train_step` of real runs, with
their loader, loss, clipping, optimiser and schedule. MFU counts the multiplications of matrices that real tokens need (peers.py), over the card's bf16
matmul measured in the same run, and over --peak for the maker's figure. Each part is written as soon as it is measured; a part that fails is named with its
error and the others go on.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--out", default="reports/gpu/bench.json")
p.add_argument("--tiny", action="store_true")
p.add_argument("--proteins", type=int, default=20_000)
p.add_argument("--v2-proteins", type=int, default=2_000)
p.add_argument(
    "--peak", type=float, default=989.4, help="TFLOP/s of dense bf16 that the maker states (989.4: H100 SXM)"
)
p.add_argument("--seconds", type=float, default=420, help="no part starts after this")
a = p.parse_args()
start = time.perf_counter()

import numpy as np
import torch
from memory import lengths_of, names, sparse_store
from peers import PlainV2, PlainV5, adamw, flops_v2, flops_v5, update, vitmae

from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create
from protmae.training.pretrain import PretrainTrainer
from protmae.training.trainer import fit, flush_pending_losses, train_step
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gpu = dev.type == "cuda"
if a.tiny:
    a.proteins, a.v2_proteins = 200, 100
S5 = (
    dict(embed_dim=96, num_layers=2, nhead=4, ff_dim=192, decoder_dim=32, decoder_layers=1, decoder_heads=4)
    if a.tiny
    else {}
)
S2 = dict(embed_dim=64, num_layers=1, nhead=4, ff_dim=128) if a.tiny else {}
D, rng, tmp = 96 if a.tiny else 960, np.random.default_rng(0), Path(tempfile.mkdtemp())
found = dict(
    command="python nbs/bench/gpu.py " + " ".join(sys.argv[1:]),
    synthetic=True,
    tiny=a.tiny,
    dim=D,
    parts={},
    failed={},
    provenance=provenance(),
)


def wait():
    if gpu:
        torch.cuda.synchronize()


def part(name, f):
    if time.perf_counter() - start > a.seconds:
        found["failed"][name] = f"not started: {a.seconds:g} s were over"
        print(name, found["failed"][name])
        return
    try:
        t = time.perf_counter()
        got = f()
        found["parts"][name] = got | dict(part_seconds=time.perf_counter() - t)
        print(f"{time.perf_counter() - start:5.0f} s  {name}: " + json.dumps(got), flush=True)
    except Exception as e:
        found["failed"][name] = f"{type(e).__name__}: {e}"
        traceback.print_exc()
    finally:
        if gpu:
            torch.cuda.empty_cache()
        found["seconds"] = time.perf_counter() - start
        write_json(a.out, found)


def timed(f, n, warm=3):
    for _ in range(warm):
        f()
    wait()
    t = time.perf_counter()
    for _ in range(n):
        f()
    wait()
    return (time.perf_counter() - t) / n


def machine():
    n = 256 if a.tiny else 8192
    x, y = (torch.randn(n, n, device=dev, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**18 if a.tiny else 2**30, device=dev, dtype=torch.uint8)
    to = torch.empty_like(big)
    return dict(
        bf16_matmul_tflops=2 * n**3 / timed(lambda: x @ y, 20) / 1e12,
        copy_gb_per_s=2 * len(big) / timed(lambda: to.copy_(big), 20) / 1e9,
    )


part("machine", machine)
limit = found["parts"].get("machine", {}).get("bf16_matmul_tflops")
mfu = lambda flops_per_s: dict(
    tflops=flops_per_s / 1e12,
    mfu_of_measured=flops_per_s / 1e12 / limit if limit else None,
    mfu_of_stated=flops_per_s / 1e12 / a.peak if gpu else None,
)


def stepper(run):
    it = [iter(())]
    run.model.train()

    def go():
        try:
            b = next(it[0])
        except StopIteration:
            it[0] = iter(run.train_dl)
            b = next(it[0])
        train_step(run, b)
        run.step += 1

    return go


# --- V5
lengths = sparse_store(tmp / "v5.h5", a.proteins, D, rng)
store = EmbeddingStore(tmp / "v5.h5")
n20 = 20_000


def v5(batch, compiled, steps):
    run = PretrainTrainer(
        "v5",
        store,
        tmp / f"v5-{batch}-{compiled}",
        sizes=S5,
        epochs=100_000,
        batch_size=batch,
        compiled=compiled,
        save_minutes=1e9,
    )
    s = timed(stepper(run), steps, 12 if compiled else 4)
    flush_pending_losses(run)
    fl = flops_v5(run.acc.unwrap_model(run.model), lengths[run.train_idx])
    return dict(
        batch=batch,
        compiled=compiled,
        step_ms=1e3 * s,
        proteins_per_s=batch / s,
        minutes_for_100_epochs_of_20000=100 * -(-n20 // batch) * s / 60,
        gflop_per_protein=fl / 1e9,
        resident=type(run.train_dl.dataset).__name__ == "Resident",
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
    ) | mfu(fl * batch / s)


for compiled in (False, True):
    for batch in (16, 64) if a.tiny else (16, 64, 256, 1024):
        part(f"v5 batch {batch}{', compiled' if compiled else ''}", lambda: v5(batch, compiled, 3 if a.tiny else 60))


def v5_epoch():
    "Everything: loader, steps, validation, checkpoints."
    run = PretrainTrainer("v5", store, tmp / "v5-epoch", sizes=S5, epochs=2, batch_size=64, save_minutes=1e9)
    t = time.perf_counter()
    fit(run)
    wait()
    return dict(
        batch=64,
        seconds_for_2_epochs=time.perf_counter() - t,
        log=[dict(seconds=r["seconds"], val_seconds=r["val_seconds"], val_loss=r["val_loss"]) for r in run.history],
    )


part("v5 two whole epochs", v5_epoch)

# --- V2
l2 = np.maximum(lengths_of(a.v2_proteins, rng), 33)
ids, seqs = names(len(l2), l2, rng)
create(tmp / "v2.h5", ids, seqs, D, model="synthetic", layer="none", note="SYNTHETIC")
with StoreWriter(tmp / "v2.h5") as w:
    for i in range(0, len(l2), 64):
        w.write((j, rng.standard_normal((l2[j], D), "f4")) for j in range(i, min(i + 64, len(l2))))
s2 = EmbeddingStore(tmp / "v2.h5")


def v2(static=None):
    run = PretrainTrainer("v2", s2, tmp / f"v2-{static}", sizes=S2, epochs=100_000, batch_size=32, save_minutes=1e9)
    n = len(run.train_dl)
    run.acc.unwrap_model(run.model).static = static
    go = stepper(run)
    for _ in range(n):
        go()  # one epoch to warm up
    s = timed(go, n, 0)
    flush_pending_losses(run)
    L = l2[run.train_idx]
    fl = flops_v2(run.acc.unwrap_model(run.model), L)
    return dict(
        batch=32,
        step_ms=1e3 * s,
        residues_per_s=L.sum() / (n * s),
        proteins_per_s=len(L) / (n * s),
        minutes_for_60_epochs_of_20000=60 * n20 * L.mean() / (L.sum() / (n * s)) / 60,
        computed_from="residues per second",
        proteins=len(l2),
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
    ) | mfu(fl / (n * s))


part("v2 batch 32", v2)
if gpu:
    part("v2 batch 32, packed, flex_attention", lambda: v2("packed"))  # torch has no such backward pass on a CPU

# --- the peers, on data that lie on the device already, in bf16 autocast as ours
auto = lambda: torch.autocast(dev.type, torch.bfloat16, enabled=gpu)


def peer_v5(kind, batch):
    kw = dict(D=D) | (dict(dim=96, layers=2, heads=4, ff=192, ddim=32, dlayers=1, dheads=4) if a.tiny else {})
    L = torch.as_tensor(rng.choice(lengths, batch)).to(dev).clamp(min=33)
    if kind == "plain":
        m = PlainV5(**kw).to(dev).train()
        x = torch.randn(batch, 1502, D, device=dev)
        f = lambda: m(x, L)
    else:
        m, loss = vitmae(**kw)
        m.to(dev).train()
        x = torch.randn(batch, 47, D, device=dev)
        f = lambda: loss(x)
    opt = adamw(m)

    def go():
        with auto():
            l = f()
        update(m, opt, l)

    s = timed(go, 3 if a.tiny else 20)
    ours = max(
        (q["proteins_per_s"] for q in found["parts"].values() if q.get("batch") == batch and "compiled" in q),
        default=None,
    )
    return dict(batch=batch, step_ms=1e3 * s, proteins_per_s=batch / s, ours_over_peer=ours and ours * s / batch)


for kind in ("plain", "vitmae"):
    part(f"peer v5 {kind} 16", lambda: peer_v5(kind, 16))
    part(f"peer v5 {kind} 64", lambda: peer_v5(kind, 64))


def peer_v2():
    m = PlainV2(D, *((64, 1, 4, 128) if a.tiny else ())).to(dev).train()
    opt, batch = adamw(m), 4 if a.tiny else 32
    L = torch.as_tensor(rng.choice(l2, batch)).to(dev)
    x = torch.randn(batch, 1502, D, device=dev)

    def go():
        with auto():
            l = m(x, L)
        update(m, opt, l)

    s = timed(go, 2 if a.tiny else 10, 2)
    rate = batch * l2.mean() / s
    ours = found["parts"].get("v2 batch 32", {}).get("residues_per_s")
    return dict(batch=batch, step_ms=1e3 * s, residues_per_s=rate, ours_over_peer=ours and ours / rate)


part("peer v2 padded", peer_v2)
print(f"{time.perf_counter() - start:.0f} s, written to {a.out}; failed: {found['failed'] or 'nothing'}")
