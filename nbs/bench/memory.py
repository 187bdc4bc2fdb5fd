"""Peak memory of V5 pretraining on a store of 20,000 proteins, against holding every protein's array in a dict.

    python nbs/bench/memory.py [--proteins 20000] [--steps 12] [--out reports/bench/memory.json]
    python nbs/bench/memory.py --tiny --out /tmp/memory.json     # to see that it runs

The store is SYNTHETIC: lengths are drawn from the histogram of the yeast proteome below, letters and numbers are
random. V5 training reads only the patch cache, so that is real (random numbers, about 57 kB a protein), while the
residues behind it are a hole in the file that reads as zeros: nothing here touches them. The full architecture trains
in a process of its own: opening the store, moments, the split, `--steps` batches of the default size, five validation
batches, one checkpoint. What is reported is that process's peak resident memory (VmHWM, elsewhere than Linux
ru_maxrss; the system's page cache is not in it) less the model's weights and gradients and AdamW's two moments.

The peer fills a dict {id: (L, 960) float16 array} from a store with real rows, in a process of its own:
`--peer-proteins` of them are really loaded, and the growth of its resident memory is scaled by residues to the 20,000
(said so in the report).

What an open store itself holds (ids, sequences, offsets, the index of ids) is the slope between two sizes of store,
each opened in a process of its own.
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
from unittest import mock

import h5py
import numpy as np

from protmae.core import PATCH_SIZE
from protmae.data.row_cache import RowCache
from protmae.data.store import EmbeddingStore
from protmae.data.writer import StoreWriter, create, put
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

# residues per protein in the yeast proteome (6,721 proteins, B4PPI's sequences, cut at 1502): how many from each edge
# up to the next
EDGES = [1, 33, *range(65, 1503, 64), 1503]
COUNTS = [43, 182, 884, 722, 625, 582, 555, 530, 444, 402, 328, 247, 201, 150, 145, 105, 73, 84, 72, 42, 41, 24, 30]
COUNTS += [29, 181]
NOTE = "SYNTHETIC, for a memory measurement: random patches, no residues"
TINY_SIZES = dict(embed_dim=96, num_layers=2, nhead=4, ff_dim=192, decoder_dim=32, decoder_layers=1, decoder_heads=4)
MOST = 2e9  # bytes that training may take besides model and optimiser


# ---- memory of a process


def peak_rss() -> int:
    "Peak resident bytes of this process. Linux's ru_maxrss would begin at what the parent held; VmHWM does not."
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def present_rss() -> int:
    "Resident bytes of this process now; the peak where the system does not say."
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss()


# ---- synthetic stores


def lengths_of(n, rng) -> np.ndarray:
    "Lengths of n proteins, distributed as in yeast."
    bins = rng.choice(len(COUNTS), n, p=np.array(COUNTS) / sum(COUNTS))
    return rng.integers(np.array(EDGES)[bins], np.array(EDGES)[bins + 1])


def names(n, lengths, rng) -> tuple:
    "Ids and random sequences."
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", "u1")
    sequences = [rng.choice(letters, length).tobytes().decode() for length in lengths]
    return [f"SYN{i:07}" for i in range(n)], sequences


def leave_a_hole(fd, offset, size):
    "In place of `posix_fallocate`: the file gets its length and no room on the disk."
    os.truncate(fd, size)


def hollow_store(path, ids, sequences, dim):
    "A store that takes no room on the disk for its rows, with every protein marked as done."
    with mock.patch.object(os, "posix_fallocate", leave_a_hole):
        create(path, ids, sequences, dim, model="synthetic", layer="none", note=NOTE)
    write_column(path, "done", 0, b"\x01" * len(ids))


def write_column(path, name, offset, data):
    "Write bytes into a dataset of a store."
    with h5py.File(path) as f:
        begin = f[name].id.get_offset()
    with open(path, "rb+", buffering=0) as file:
        put(file.fileno(), data, begin + offset)


def sparse_store(path, n, dim, rng) -> np.ndarray:  # lengths
    "A store whose rows are a hole in the file, and the patch cache that training reads, full of random numbers."
    lengths = lengths_of(n, rng)
    hollow_store(path, *names(n, lengths, rng), dim)
    moments = np.stack([np.zeros(dim), np.ones(dim)]).astype("<f4")
    for i in range(0, n, 256):
        part = np.tile(moments, (min(256, n - i), 1, 1))
        write_column(path, "moments", i * moments.nbytes, part)
    StoreWriter(path).close()

    def random_patches(proteins):
        for i in proteins:
            shape = (-(-lengths[i] // PATCH_SIZE), dim)
            high, low = (rng.standard_normal(shape, "f4") * scale for scale in (1 / 6, 1e-4))
            yield i, dict(patches=high, patches_low=low)

    with EmbeddingStore(path) as store:
        key, half = dict(fingerprint=store.fingerprint, patching="window"), (dim, "<f2")
    columns = dict(patches=half, patches_low=half)
    cache = RowCache(patch_cache_of(path), key, -(-lengths // PATCH_SIZE), columns)
    cache.fill(random_patches, doing="make patches")
    return lengths


def patch_cache_of(path) -> Path:
    "Where a store's patches lie."
    return path.with_suffix(".window-patches.h5")


def real_store(path, lengths, dim, rng) -> tuple:  # ids and sequences
    "A store with random rows."
    n = len(lengths)
    ids, sequences = names(n, lengths, rng)
    create(path, ids, sequences, dim, model="synthetic", layer="none", note="SYNTHETIC random rows")
    with StoreWriter(path) as writer:
        for begin in range(0, n, 64):
            part = range(begin, min(begin + 64, n))
            writer.write((i, rng.standard_normal((lengths[i], dim), "f4")) for i in part)
    return ids, sequences


# ---- what is measured, each in a process of its own


def n_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_training(path, options) -> dict:
    "Peak memory of V5 training, and what of it is model and optimiser."
    store = EmbeddingStore(path)
    from protmae.training.pretrain import PretrainTrainer  # here, so that the other processes hold no torch

    after_torch = peak_rss()  # the interpreter and its libraries, and the open store
    sizes = TINY_SIZES if options.tiny else None
    run = PretrainTrainer("v5", store, Path(path).parent / "run", sizes=sizes, cpu=True)
    run.model.train()
    after_building = peak_rss()
    for batch in itertools.islice(run.train_dl, options.steps):
        run.train_step(batch)
    after_steps = peak_rss()
    run.val_dl = list(itertools.islice(run.val_dl, 5))
    run.validation()
    run.save_state()
    weights = n_bytes(run.model.parameters())
    return dict(
        peak_rss=peak_rss(),
        after_torch=after_torch,
        after_building=after_building,
        after_steps=after_steps,
        weights=weights,
        gradients=weights,
        optimizer=n_bytes(value for state in run.opt.optimizer.state.values() for value in state.values()),
        batch_size=run.config.batch_size,
        parameters=run.n_params,
        steps=options.steps,
        train_proteins=len(run.train_idx),
    )


def measure_open_store(path, options) -> dict:
    "Memory of a process that has opened a store."
    store = EmbeddingStore(path)
    return dict(peak_rss=peak_rss(), rss=present_rss(), proteins=len(store))


def measure_dict(path, options) -> dict:
    "Memory of a process that has read all of a store into a dict."
    store = EmbeddingStore(path)
    before = peak_rss()
    arrays = {name: store[name] for name in store.ids}
    return dict(before=before, peak_rss=peak_rss(), proteins=len(arrays), residues=int(store.lengths.sum()))


CHILDREN = dict(training=measure_training, open=measure_open_store, dict=measure_dict)


def in_child(what, path, options) -> dict:
    "What one of `CHILDREN` finds, in a new process."
    command = [sys.executable, __file__, "--child", what, str(path), "--steps", str(options.steps)]
    done = subprocess.run(command + ["--tiny"] * options.tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def measure_all(folder, options) -> dict:
    "The figures of all processes, on stores made in `folder`."
    rng, big, wide, small = np.random.default_rng(0), folder / "big.h5", folder / "wide.h5", folder / "small.h5"
    lengths = sparse_store(big, options.proteins, options.dim, rng)
    found = dict(residues=int(lengths.sum()), patch_cache_bytes=patch_cache_of(big).stat().st_size)
    found["ours"], found["few"] = in_child("training", big, options), in_child("open", big, options)
    more = lengths_of(5 * options.proteins, rng)
    hollow_store(wide, *names(len(more), more, rng), options.dim)
    found["many"], found["mean_length"] = in_child("open", wide, options), float(more.mean())
    real_store(small, lengths_of(options.peer_proteins, rng), options.dim, rng)
    return found | dict(peer=in_child("dict", small, options))


# ---- the report


def report(found, options) -> dict:
    "What is written."
    ours, peer, few, many = (found[name] for name in ("ours", "peer", "few", "many"))
    state = ours["weights"] + ours["gradients"] + ours["optimizer"]
    grown = peer["peak_rss"] - peer["before"]
    scaled = grown * found["residues"] / peer["residues"]
    per_protein = {
        f"{name}_bytes_per_protein": (many[name] - few[name]) / (many["proteins"] - few["proteins"])
        for name in ("rss", "peak_rss")
    }
    method = f"{peer['proteins']} proteins really loaded, growth scaled by residues to {options.proteins}"
    return dict(
        what="peak resident memory of V5 pretraining (full architecture) on a synthetic store",
        command=" ".join(["python nbs/bench/memory.py", *sys.argv[1:]]),
        proteins=options.proteins,
        residues=found["residues"],
        mean_length=found["residues"] / options.proteins,
        dim=options.dim,
        tiny=options.tiny,
        residues_bytes=found["residues"] * options.dim * 2,
        patch_cache_bytes=found["patch_cache_bytes"],
        ours=ours,
        model_gradients_optimizer=state,
        ours_besides_model=ours["peak_rss"] - state,
        open_store=dict(few=few, many=many, mean_length=found["mean_length"], **per_protein),
        peer=peer | dict(method=method, grown=grown, scaled_to_store=scaled),
        ratio=scaled / (ours["peak_rss"] - state),
        provenance=provenance(),
    )


def print_report(figures):
    "The figures in three lines."
    ours, peer, store = figures["ours"], figures["peer"], figures["open_store"]
    print(
        f"{figures['proteins']:,} proteins, {figures['residues']:,} residues: peak {ours['peak_rss'] / 1e9:.2f} GB, "
        f"of which {figures['model_gradients_optimizer'] / 1e9:.2f} GB are weights, gradients and AdamW's moments "
        f"and {figures['ours_besides_model'] / 1e9:.2f} GB all else"
    )
    print(
        f"a dict of all arrays: {peer['grown'] / 1e9:.2f} GB for {peer['proteins']:,} proteins, "
        f"{peer['scaled_to_store'] / 1e9:.1f} GB for {figures['proteins']:,} by residues; "
        f"{figures['ratio']:.1f} times as much"
    )
    print(
        f"an open store holds {store['rss_bytes_per_protein']:,.0f} bytes per protein, "
        f"{store['peak_rss_bytes_per_protein']:,.0f} while it is opened"
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proteins", type=int, default=20_000)
    parser.add_argument("--peer-proteins", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dim", type=int, default=960)
    parser.add_argument("--tiny", action="store_true", help="a small model and small stores: to see that it runs")
    parser.add_argument("--out", default="reports/bench/memory.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.proteins, options.peer_proteins, options.dim = 300, 50, 96
    return options


def main():
    options = parse()
    if options.child:
        what, path = options.child
        print("RESULT " + json.dumps(CHILDREN[what](path, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = report(measure_all(Path(folder), options), options)
    write_json(options.out, figures)
    print_report(figures)
    print(options.out)
    assert figures["ours_besides_model"] < MOST, "more than 2 GB besides model and optimiser"


if __name__ == "__main__":
    main()
