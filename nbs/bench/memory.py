"""Peak memory of V5 pretraining on a store of 20,000 proteins, against holding every protein's array in a dict.

    python nbs/bench/memory.py [--proteins 20000] [--steps 12] [--out reports/bench/memory.json]

The store is SYNTHETIC: lengths are drawn from the histogram of the yeast proteome below, letters and numbers are random. V5 training reads only the
patch cache, so that is real (random numbers, about 57 kB a protein) while the residues behind it are a hole in the file that reads as zeros: nothing
here touches them. The full architecture trains in a process of its own: opening the store, moments, the split, `--steps` batches of the default size,
five validation batches, one checkpoint. What is reported is that process's peak resident memory (VmHWM, elsewhere than Linux ru_maxrss; the system's page cache is not in it) less
the model's weights and gradients and AdamW's two moments.

The peer fills a dict {id: (L, 960) float16 array} from a store with real rows, in a process of its own: `--peer-proteins` of them are really loaded, and
the growth of its resident memory is scaled by residues to the 20,000 (said so in the report).

What an open store itself holds (ids, sequences, offsets, the index of ids) is the slope between two sizes of store, each opened in a process of its own.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

from protmae.core import PATCH_SIZE
from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

# residues per protein in the yeast proteome (6,721 proteins, B4PPI's sequences, cut at 1502): how many from each edge up to the next
EDGES = [1, 33, *range(65, 1503, 64), 1503]
COUNTS = [
    43,
    182,
    884,
    722,
    625,
    582,
    555,
    530,
    444,
    402,
    328,
    247,
    201,
    150,
    145,
    105,
    73,
    84,
    72,
    42,
    41,
    24,
    30,
    29,
    181,
]


def rss():
    "Peak resident bytes of this process so far. Linux's ru_maxrss would start at what the parent held when it started us; VmHWM begins with this program."
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def lengths_of(n, rng):
    bins = rng.choice(len(COUNTS), n, p=np.array(COUNTS) / sum(COUNTS))
    return rng.integers(np.array(EDGES)[bins], np.array(EDGES)[bins + 1])


def names(n, lengths, rng):
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", "u1")
    return [f"SYN{i:07}" for i in range(n)], [rng.choice(letters, l).tobytes().decode() for l in lengths]


def hollow(path, ids, seqs, dim):
    "A store that takes no room on the disk for its rows, with every protein marked as done."
    reserve, os.posix_fallocate = os.posix_fallocate, lambda fd, a, size: os.truncate(fd, size)
    try:
        create(
            path,
            ids,
            seqs,
            dim,
            model="synthetic",
            layer="none",
            note="SYNTHETIC, for a memory measurement: random patches, no residues",
        )
    finally:
        os.posix_fallocate = reserve
    w = StoreWriter(path)
    w._put("done", 0, 1, b"\x01" * len(ids))
    w.done[:] = True
    return w


def sparse_store(path, n, dim, rng):
    "A store whose rows are a hole in the file, and the patch cache that training reads, full of random numbers."
    lengths = lengths_of(n, rng)
    ids, seqs = names(n, lengths, rng)
    w = hollow(path, ids, seqs, dim)
    one = np.stack([np.zeros(dim), np.ones(dim)]).astype("<f4")
    for i in range(n):
        w._put("moments", i, one.nbytes, one)
    w.close()
    with EmbeddingStore(path) as s, h5py.File(path.with_suffix(".window-patches.h5"), "w") as f:
        off = np.concatenate([[0], np.cumsum(-(-lengths // PATCH_SIZE))])
        f.attrs.update(fingerprint=s.fingerprint, patching="window")
        f["offsets"] = off
        high, low = (f.create_dataset(k, (off[-1], dim), "f2") for k in ("patches", "patches_low"))
        for a in range(0, off[-1], 8192):
            b = min(a + 8192, off[-1])
            high[a:b] = rng.standard_normal((b - a, dim), "f4") / 6
            low[a:b] = rng.standard_normal((b - a, dim), "f4") * 1e-4
    return lengths


def real_store(path, n, dim, rng):
    lengths = lengths_of(n, rng)
    ids, seqs = names(n, lengths, rng)
    create(path, ids, seqs, dim, model="synthetic", layer="none", note="SYNTHETIC random rows")
    with StoreWriter(path) as w:
        for a in range(0, n, 64):
            w.write((i, rng.standard_normal((lengths[i], dim), "f4")) for i in range(a, min(a + 64, n)))


def ours(path, steps):
    s = EmbeddingStore(path)
    from protmae.training.checkpointing import save_state
    from protmae.training.pretrain import PretrainTrainer
    from protmae.training.trainer import train_step

    with_torch = rss()  # the interpreter and its libraries, and the open store
    run = PretrainTrainer("v5", s, Path(path).parent / "run", cpu=True)
    run.model.train()
    built = rss()
    for b in itertools.islice(run.train_dl, steps):
        train_step(run, b)
        run.step += 1
    stepped = rss()
    run.val_dl = list(itertools.islice(run.val_dl, 5))
    run.model.eval()
    run.validate()
    save_state(run)
    count = lambda ts: sum(t.numel() * t.element_size() for t in ts)
    weights = count(run.model.parameters())
    moments = count(t for st in run.opt.optimizer.state.values() for t in st.values())
    return dict(
        peak_rss=rss(),
        after_torch=with_torch,
        after_building=built,
        after_steps=stepped,
        weights=weights,
        gradients=weights,
        optimizer=moments,
        batch_size=run.config["batch_size"],
        parameters=run.n_params,
        steps=steps,
        train_proteins=len(run.train_idx),
    )


def opened(path):
    s = EmbeddingStore(path)
    return dict(
        peak_rss=rss(),
        rss=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if Path("/proc/self/statm").exists()
        else rss(),
        proteins=len(s),
    )


def peer(path):
    s = EmbeddingStore(path)
    before = rss()
    arrays = {k: s[k] for k in s.ids}
    return dict(before=before, peak_rss=rss(), proteins=len(arrays), residues=int(s.lengths.sum()))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--proteins", type=int, default=20_000)
    p.add_argument("--peer-proteins", type=int, default=1_000)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--dim", type=int, default=960)
    p.add_argument("--out", default="reports/bench/memory.json")
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        got = dict(
            ours=lambda: ours(a.child[1], a.steps), peer=lambda: peer(a.child[1]), open=lambda: opened(a.child[1])
        )[a.child[0]]()
        print("RESULT " + json.dumps(got))
        sys.exit()

    def child(which, path):
        r = subprocess.run(
            [sys.executable, __file__, "--child", which, str(path), "--steps", str(a.steps)],
            capture_output=True,
            text=True,
        )
        assert r.returncode == 0, r.stdout + r.stderr
        return json.loads(next(l for l in r.stdout.splitlines() if l.startswith("RESULT ")).removeprefix("RESULT "))

    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        rng = np.random.default_rng(0)
        lengths = sparse_store(d / "big.h5", a.proteins, a.dim, rng)
        cache = (d / "big.window-patches.h5").stat().st_size
        got = child("ours", d / "big.h5")
        few = child("open", d / "big.h5")
        more = lengths_of(5 * a.proteins, rng)
        os.close(hollow(d / "wide.h5", *names(len(more), more, rng), a.dim).fd)
        many = child("open", d / "wide.h5")
        real_store(d / "small.h5", a.peer_proteins, a.dim, rng)
        other = child("peer", d / "small.h5")
    residues = int(lengths.sum())
    state = got["weights"] + got["gradients"] + got["optimizer"]
    grown = other["peak_rss"] - other["before"]
    scaled = grown * residues / other["residues"]

    res = dict(
        what="peak resident memory of V5 pretraining (full architecture) on a synthetic store",
        command=" ".join(["python nbs/bench/memory.py", *sys.argv[1:]]),
        proteins=a.proteins,
        residues=residues,
        mean_length=residues / a.proteins,
        dim=a.dim,
        residues_bytes=residues * a.dim * 2,
        patch_cache_bytes=cache,
        ours=got,
        model_gradients_optimizer=state,
        ours_besides_model=got["peak_rss"] - state,
        open_store=dict(
            few=few,
            many=many,
            mean_length=float(more.mean()),
            **{
                f"{k}_bytes_per_protein": (many[k] - few[k]) / (many["proteins"] - few["proteins"])
                for k in ("rss", "peak_rss")
            },
        ),
        peer=other
        | dict(
            method=f"{other['proteins']} proteins really loaded, growth scaled by residues to {a.proteins}",
            grown=grown,
            scaled_to_store=scaled,
        ),
        ratio=scaled / (got["peak_rss"] - state),
        provenance=provenance(),
    )
    write_json(a.out, res)
    print(
        f"{a.proteins:,} proteins, {residues:,} residues: peak {got['peak_rss'] / 1e9:.2f} GB, of which {state / 1e9:.2f} GB are weights, gradients and AdamW's moments and {res['ours_besides_model'] / 1e9:.2f} GB all else"
    )
    print(
        f"a dict of all arrays: {grown / 1e9:.2f} GB for {other['proteins']:,} proteins, {scaled / 1e9:.1f} GB for {a.proteins:,} by residues; {res['ratio']:.1f} times as much -> {a.out}"
    )
    print(
        f"an open store holds {res['open_store']['rss_bytes_per_protein']:,.0f} bytes per protein, {res['open_store']['peak_rss_bytes_per_protein']:,.0f} while it is opened"
    )
    assert res["ours_besides_model"] < 2e9, "more than 2 GB besides model and optimiser"
