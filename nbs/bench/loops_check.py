"""Holds the loops of loops.py against the library's trainers, on a CPU at a tiny size: the log of every epoch.

python nbs/bench/loops_check.py
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lanes import Scheduler
from loop_heads import HeadLoop
from loops import Data, PretrainLoop

from protmae.core import N_PATCHES
from protmae.data.patches import PatchCache
from protmae.data.synthetic import make_demo_store
from protmae.models.hub import load_model
from protmae.ppi.config import config_for
from protmae.ppi.pairs import read_pairs
from protmae.ppi.splits import make_split
from protmae.ppi.training import PPITrainer
from protmae.training.pretrain import PretrainTrainer

CPU = torch.device("cpu")
SIZES = dict(
    v5=dict(embed_dim=32, num_layers=2, nhead=4, ff_dim=64, decoder_dim=16, decoder_layers=1, decoder_heads=2),
    v2=dict(embed_dim=32, num_layers=1, nhead=4, ff_dim=64),
)
FIGURES = ("train_loss", "val_loss", "skill", "skill_mean", "skill_visible")
CHANGES = dict(epochs=2, batch_size=64, dropout=0.0, seed=0, embed_dim=32, n_heads=4)  # of a head


def check_near(what, found, expected, limit):
    "Print the largest difference; raise where it is above the limit."
    difference = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    print(f"{what}: {len(found)} values, largest difference {difference:.1e}")
    assert difference < limit, f"{what}: {difference} is above {limit}"


def run_alone(job):
    "Run one job to its end."
    scheduler = Scheduler()
    scheduler.add(job)
    scheduler.run()
    assert not scheduler.failed, scheduler.failed
    return job


def patches_of(store, mean, std) -> torch.Tensor:
    "(N, 47, D) standardised patches of a store."
    cache, out = PatchCache(store), torch.zeros(len(store), N_PATCHES, store.dim)
    for i in range(len(store)):
        out[i, : cache.counts[i]] = (torch.from_numpy(cache[i]) - torch.as_tensor(mean)) / torch.as_tensor(std)
    return out


def data_of(arch, store, trainer) -> Data:
    "What the loop reads, for the same proteins as the library's run."
    proteins = trainer.train_idx, trainer.val_idx
    if arch == "v5":
        patches = patches_of(store, trainer.mean, trainer.std)
        return Data(store.lengths, store.dim, CPU, *proteins, patches=patches)
    table = torch.from_numpy(np.concatenate([store[i] for i in range(len(store))]))
    mean, std = torch.as_tensor(trainer.mean), torch.as_tensor(trainer.std)
    return Data(store.lengths, store.dim, CPU, *proteins, table=table, mean=mean, std=std)


def check_pretraining(arch, store, folder) -> Path:  # of the library's checkpoint
    "Both ways, three epochs."
    changes = dict(sizes=SIZES[arch], epochs=3, batch_size=16)
    trainer = PretrainTrainer(arch, store, folder / arch, cpu=True, **changes)
    rows = trainer.fit()
    loop = run_alone(PretrainLoop(arch, arch, data_of(arch, store, trainer), CPU, **changes))
    for name in FIGURES:
        check_near(f"{arch} {name}", [row[name] for row in loop.log()], [row[name] for row in rows], 1e-4)
    return trainer.out / "best.safetensors"


def load_encoder_of(checkpoint):
    return load_model(checkpoint)[0].encoder


def check_head(name, checkpoint, store, folder):
    "Both ways, two epochs; without a checkpoint the patches themselves."
    pairs = read_pairs(folder / "demo.pairs.tsv", store)
    split = make_split(pairs, "random", 0)
    trainer = PPITrainer(checkpoint, store, pairs, split, folder / f"ppi-{name}", cpu=True, **CHANGES)
    rows = trainer.fit()
    patches = patches_of(store, trainer.meta["mean"], trainer.meta["std"])
    make_encoder = partial(load_encoder_of, checkpoint) if checkpoint else partial(getattr, trainer.net, "encoder")
    data, train = Data(store.lengths, store.dim, CPU, patches=patches), pairs.proteins_of(split.train)
    loop = run_alone(HeadLoop(name, data, pairs, split, config_for(**CHANGES), make_encoder, train, CPU))
    expected = {figure: [row[figure] for row in rows] for figure in ("train_loss", "val_auroc")}
    check_near(f"ppi {name} train_loss", loop.result["train_loss_by_epoch"], expected["train_loss"], 1e-3)
    check_near(f"ppi {name} val_auroc", loop.result["val_auroc_by_epoch"], expected["val_auroc"], 5e-3)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        store = make_demo_store(folder / "demo.h5", n=120, dim=48)
        checkpoints = {arch: check_pretraining(arch, store, folder) for arch in ("v5", "v2")}
        check_head("v5", checkpoints["v5"], store, folder)
        check_head("patches", None, store, folder)
    print("the loops agree with the library")


if __name__ == "__main__":
    main()
