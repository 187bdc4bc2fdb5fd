"""How fast: pretraining of V5 and V2, the store, and PPI training, against what people would write or pick instead.

    python nbs/bench/speed.py [--rows v5 v2 store ppi memory] [--rounds 3] [--threads 2] [--out reports/bench/speed.json]

Ours and the peer run in turn in this process: same threads, same data, same dtype (float32), same optimiser settings. Each figure is the median of the
rounds, each ratio the median of the rounds' ratios. `share` is the arithmetic done per second over what a large float32 matmul reaches here, measured
in the same run. Data are SYNTHETIC: lengths drawn from the yeast proteome's histogram (numbers in memory.py), embeddings random.

| row | ours | peer |
|---|---|---|
| v5 plain | `train_step` of a real run, batches from the patch cache | residues from one HDF5 dataset per protein, padded to 1502, all 48 tokens with mask tokens through nn.TransformerEncoder |
| v5 vitmae | the same | `transformers.ViTMAEForPreTraining` of the same width, depth and decoder, on 47 patches from the same cache |
| v2 | `train_step` of a real run | the same network, nn.TransformerEncoder, padded to 1502 |
| store | `EmbeddingStore.batch`, 32 random proteins | one HDF5 dataset per protein, as D-SCRIPT writes it (lzf: float32, LZF) and as plain float16 (hdf); a bare numpy memmap |
| ppi | an epoch of pairs from the token cache | both proteins of every pair through the frozen encoder, every time |
| memory | peak memory of a V5 run on 20,000 proteins besides model and optimiser (memory.py) | every protein's array in a dict |

For V5 it also says where the time of a step goes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--rows", nargs="+", default=["v5", "v2", "store", "ppi", "memory"])
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--threads", type=int)
p.add_argument("--proteins", type=int, default=128)
p.add_argument("--tiny", action="store_true", help="small models and stores: to see that it runs")
p.add_argument("--out", default="reports/bench/speed.json")
a = p.parse_args()

import h5py
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from memory import lengths_of, names
from peers import PlainV2, PlainV5, adamw, count, flops_v2, flops_v5, update, vitmae

from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create
from protmae.ppi.features import EncoderInputs
from protmae.ppi.pairs import Pairs
from protmae.ppi.splits import random_split
from protmae.ppi.training import PPITrainer
from protmae.training.pretrain import PretrainTrainer
from protmae.training.trainer import train_step
from protmae.utils.files import write_json
from protmae.utils.provenance import git_commit, provenance

if a.threads:
    torch.set_num_threads(a.threads)
tmp = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
torch.manual_seed(0)
N, D = (160, 96) if a.tiny else (a.proteins, 960)
S5 = (
    dict(embed_dim=96, num_layers=2, nhead=4, ff_dim=192, decoder_dim=32, decoder_layers=1, decoder_heads=4)
    if a.tiny
    else {}
)
S2 = dict(embed_dim=64, num_layers=1, nhead=4, ff_dim=128) if a.tiny else {}
lengths = lengths_of(N, rng)
lengths = np.maximum(lengths, 33)
ids, seqs = names(N, lengths, rng)
create(tmp / "s.h5", ids, seqs, D, model="synthetic", layer="none", note="SYNTHETIC")
with StoreWriter(tmp / "s.h5") as w:
    for i in range(0, N, 32):
        w.write((j, rng.standard_normal((lengths[j], D), "f4")) for j in range(i, min(i + 32, N)))
store = EmbeddingStore(tmp / "s.h5")
mean, std = (torch.as_tensor(x) for x in store.mean_std())
with h5py.File(tmp / "each.h5", "w") as f:
    for i in ids:
        f[i] = store[i]
with h5py.File(tmp / "dscript.h5", "w") as f:  # float32 and LZF, as dscript/language_model.py of D-SCRIPT writes them
    for i in ids:
        f.create_dataset(i, data=store[i].astype("f4"), compression="lzf")
flat = np.memmap(tmp / "flat.f16", "f2", "w+", shape=(int(lengths.sum()), D))
offs = np.concatenate([[0], np.cumsum(lengths)])
for i in range(N):
    flat[offs[i] : offs[i + 1]] = store[i]
flat.flush()


def clock(f):
    t = time.perf_counter()
    f()
    return time.perf_counter() - t


def in_turn(fs, rounds=a.rounds, warm=1):
    "Seconds of each function, median over rounds in turn, and each round's seconds."
    for f in list(fs.values()) * warm:
        f()
    got = {k: [] for k in fs}
    for _ in range(rounds):
        for k, f in fs.items():
            got[k].append(clock(f))
    return {k: statistics.median(v) for k, v in got.items()}, got


rows = {}


def row(name, unit, amount, got, peer, goal, **more):
    "One line: `amount` maps ours and peer to units per call."
    t, rounds = got
    ours, theirs = amount["ours"] / t["ours"], amount[peer] / t[peer]
    ratio = statistics.median([(amount["ours"] / o) / (amount[peer] / q) for o, q in zip(rounds["ours"], rounds[peer])])
    rows[name] = dict(
        commit=git_commit(), limits=limits, unit=unit, ours=ours, peer=theirs, ratio=ratio, goal=goal, seconds=t, **more
    )
    print(
        f"{name:12} {unit:12} ours {ours:12,.1f}   peer {theirs:12,.1f}   ratio {ratio:6.2f}"
        + (f" (goal {goal})" if goal else "")
        + (f"   share of the matmul limit {more['share']:.0%}" if more.get("share") else ""),
        flush=True,
    )


# --- the machine's limits
n = 512 if a.tiny else 4096
x, y = torch.randn(n, n), torch.randn(n, n)
big, to = torch.empty(2**20 if a.tiny else 2**28), torch.empty(2**20 if a.tiny else 2**28)
big.fill_(1)
to.fill_(1)
t, _ = in_turn(dict(mm=lambda: x @ y, copy=lambda: to.copy_(big)), 5)
gflops, gbs = 2 * n**3 / t["mm"] / 1e9, 2 * 4 * len(big) / t["copy"] / 1e9
limits = dict(matmul_gflops=gflops, copy_gb_per_s=gbs)
print(
    f"this machine: float32 matmul {gflops:,.0f} GFLOP/s, copy {gbs:,.1f} GB/s (read and written), {torch.get_num_threads()} threads"
)
del x, y, big, to


def stepper(run, k):
    "k training steps of a run, batches as its own loader brings them."
    it = [iter(run.train_dl)]
    run.model.train()

    def go():
        for _ in range(k):
            try:
                b = next(it[0])
            except StopIteration:
                it[0] = iter(run.train_dl)
                b = next(it[0])
            train_step(run, b)
            run.step += 1

    return go


def where(run, n=5):
    "Seconds of each part of a training step, median: what `train_step` does, taken apart."
    got, it = [], iter(run.train_dl)
    for _ in range(n + 1):
        t = [time.perf_counter()]
        b = next(it, None) or next(it := iter(run.train_dl))
        t.append(time.perf_counter())
        loss, _ = run.loss(b)
        t.append(time.perf_counter())
        loss.backward()
        t.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        t.append(time.perf_counter())
        run.opt.step()
        run.opt.zero_grad()
        t.append(time.perf_counter())
        got.append(np.diff(t))
    return dict(zip(("data", "forward", "backward", "clip", "optimiser"), np.median(got[1:], 0).round(4).tolist()))


# --- V5
if "v5" in a.rows:
    for batch in (16, 64):
        run = PretrainTrainer("v5", store, tmp / f"v5-{batch}", sizes=S5, cpu=True, epochs=1000, batch_size=batch)
        k = max(1, 64 // batch)
        kw = dict(D=D) | dict(dim=96, layers=2, heads=4, ff=192, ddim=32, dlayers=1, dheads=4) if a.tiny else {}
        plain = PlainV5(**kw).train()
        po = adamw(plain)
        vit, vit_loss = vitmae(**kw)
        vit.train()
        vo = adamw(vit)
        each = h5py.File(tmp / "each.h5", "r")
        cache = run.task.data

        def plain_step():
            idx = rng.choice(run.train_idx, batch, replace=False)
            x = torch.zeros(batch, 1502, D)
            L = torch.as_tensor(lengths[idx])
            for r, i in zip(x, idx):
                r[: lengths[i]] = (torch.from_numpy(each[ids[i]][:]).float() - mean) / std
            update(plain, po, plain(x, L))

        def vit_step():
            update(vit, vo, vit_loss(cache.__getitems__(rng.choice(run.train_idx, batch, replace=False))["patches"]))

        ours = stepper(run, k)
        got = in_turn(dict(ours=ours, plain=plain_step, vitmae=vit_step))
        flops = flops_v5(run.model, lengths[run.train_idx])
        share = flops * batch * k / got[0]["ours"] / 1e9 / gflops
        parts = where(run)
        print(
            f"v5, batch {batch}, seconds of a step: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items()), flush=True
        )
        for peer, goal in (("plain", 6), ("vitmae", 1.8)):
            row(
                f"v5 {peer} {batch}",
                "proteins/s",
                dict(ours=batch * k, plain=batch, vitmae=batch),
                got,
                peer,
                goal,
                batch=batch,
                share=share,
                gflop_per_protein=flops / 1e9,
                seconds_of_a_step=parts,
                peer_parameters=count(dict(plain=plain, vitmae=vit)[peer]),
                our_parameters=run.n_params,
            )
        each.close()
        del run, plain, po, vit, vo

# --- V2
if "v2" in a.rows:
    batch = 4 if a.tiny else 32
    run = PretrainTrainer("v2", store, tmp / "v2", sizes=S2, cpu=True, epochs=1000, batch_size=batch)
    k = len(run.train_dl)  # a whole epoch: long and short batches as they come
    plain = PlainV2(D, *((64, 1, 4, 128) if a.tiny else ())).train()
    po = adamw(plain)

    def plain_step():
        idx = rng.choice(run.train_idx, batch, replace=False)
        x = torch.zeros(batch, 1502, D)
        L = torch.as_tensor(lengths[idx])
        for r, i in zip(x, idx):
            r[: lengths[i]] = (torch.from_numpy(store[i]).float() - mean) / std
        update(plain, po, plain(x, L))

    ours = stepper(run, k)
    got = in_turn(dict(ours=ours, plain=plain_step), min(a.rounds, 3), 0)
    tot = float(lengths[run.train_idx].sum())
    flops = flops_v2(run.model, lengths[run.train_idx])
    row(
        "v2 plain",
        "residues/s",
        dict(ours=tot, plain=batch * tot / len(run.train_idx)),
        got,
        "plain",
        4.5,
        batch=batch,
        share=flops / got[0]["ours"] / 1e9 / gflops,
    )  # a padded batch costs the same whoever is in it: scaled by the mean length
    del run, plain, po

# --- the store
if "store" in a.rows:
    B, many = 32, 20
    draws = [rng.choice(N, B, replace=False) for _ in range(many)]
    size = sum(int(lengths[d].sum()) for d in draws) * D * 2
    each, dscript = h5py.File(tmp / "each.h5", "r"), h5py.File(tmp / "dscript.h5", "r")
    mm = np.memmap(tmp / "flat.f16", "f2", "r", shape=flat.shape)
    keep, room = [None] * B, np.empty((1502 * B, D), np.float16)

    def ours():
        for d in draws:
            store.batch(d, room)  # as training reads: into memory it has

    def hdf():
        for d in draws:
            for j, i in enumerate(d):
                keep[j] = each[ids[i]][:]

    def lzf():
        for d in draws:
            for j, i in enumerate(d):
                keep[j] = dscript[ids[i]][:]

    def mapped():
        for d in draws:
            for j, i in enumerate(d):
                keep[j] = np.array(mm[offs[i] : offs[i + 1]])

    got = in_turn(dict(ours=ours, lzf=lzf, hdf=hdf, memmap=mapped), 2 * a.rounds)
    for peer, goal in (("lzf", 5), ("hdf", None), ("memmap", 0.7)):
        row(
            f"store {peer}",
            "GB/s",
            {k: size / 1e9 for k in ("ours", "lzf", "hdf", "memmap")},
            got,
            peer,
            goal,
            note="all in the page cache; bytes of float16 delivered",
            share_of_copy=size / 1e9 / got[0]["ours"] / (gbs / 2),
        )
    each.close()
    dscript.close()

# --- PPI with a frozen encoder
if "ppi" in a.rows:
    ck = PretrainTrainer("v5", store, tmp / "enc", sizes=S5, cpu=True, epochs=1)
    ck.save_weights(tmp / "enc" / "e.safetensors", dict(epoch=0, val_loss=0.0))
    m = 40 * N
    ia, ib = rng.integers(0, N, (2, m))
    ok = ia < ib
    pairs = Pairs(ids, ia[ok], ib[ok], rng.integers(0, 2, ok.sum()).astype("int8"))
    run = PPITrainer(
        tmp / "enc" / "e.safetensors",
        store,
        pairs,
        random_split(pairs),
        tmp / "ppi",
        cpu=True,
        epochs=1000,
        embed_dim=S5.get("embed_dim", 768),
        n_heads=4 if a.tiny else 8,
    )
    net, k, batch = run.model.net, 4, run.config["batch_size"]
    inputs = EncoderInputs(net, store, mean.numpy(), std.numpy())
    small = 16

    def naive():  # both proteins of every pair through the encoder, then the same head and step
        i = rng.choice(run.split.train, small)
        x, L = inputs.encoded(net, np.concatenate([pairs.a[i], pairs.b[i]]).tolist())
        j = torch.arange(small)
        loss = F.binary_cross_entropy_with_logits(
            net.score(net.whiten(x), L, j, j + small), torch.as_tensor(pairs.label[i], dtype=torch.float32)
        )
        run.acc.backward(loss)
        run.opt.step()
        run.opt.zero_grad()

    def encode():  # what is paid once per store and checkpoint
        with torch.no_grad():
            inputs.encoded(net, list(range(0, N, max(1, N // 32)))[:32])

    got = in_turn(dict(ours=stepper(run, k), naive=naive, encode=encode))
    once = got[0]["encode"] / 32
    row(
        "ppi",
        "pairs/s",
        dict(ours=batch * k, naive=small),
        got,
        "naive",
        10,
        batch=batch,
        proteins_encoded_per_s=1 / once,
        epoch_of_yeast=dict(
            pairs=60_738,
            proteins=5_679,
            cached_s=60_738 * got[0]["ours"] / (batch * k),
            encode_once_s=5_679 * once,
            both_every_time_s=60_738 * got[0]["naive"] / small,
            note="computed from the rates above",
        ),
    )

if "memory" in a.rows and not a.tiny:
    import subprocess

    o = Path(a.out).with_name("memory.json")
    subprocess.run([sys.executable, str(Path(__file__).with_name("memory.py")), "--out", str(o)], check=True)
    rows["memory"] = dict(see=o.name)

out = Path(a.out)
old = (
    json.loads(out.read_text()).get("rows", {})
    if out.exists() and set(a.rows) != {"v5", "v2", "store", "ppi", "memory"}
    else {}
)
write_json(
    out,
    dict(
        command="python " + " ".join(sys.argv),
        synthetic=True,
        proteins=N,
        dim=D,
        tiny=a.tiny,
        limits=limits,
        rows=old | rows,
        provenance=provenance(),
    ),
)
print(f"written to {out}")
