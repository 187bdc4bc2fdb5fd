"""How long a slider of 01_explore_masking takes to answer for one protein: the kernel's side of it, per model.

    python nbs/bench/slider.py data/yeast.h5 data/runs/RUN2/best.safetensors data/runs/RUN5/best.safetensors
    [--threads 1] [--out reports/bench/slider.json]

Every move goes to a place that was not computed before, as when one drags. `mask` is the first thing to be seen, the
mask over the embedding; `all` is that and everything that follows: the model, the errors, the attention, made and
handed to the front end. `kept` is a move to a place that was computed while nobody waited, as the slider's neighbours
are. Medians, by the clock on the wall, which other work on the machine slows down (the load is recorded), and in CPU
time of this process, which it hardly does.

What follows the mask is put off while an event loop runs, as it does in a kernel, and is done at once where none runs.
"""

import argparse
import asyncio
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

PLACES = np.round(np.linspace(0.05, 0.95, 19), 2).tolist()  # where the slider can stand
WARM_UP = 2  # moves that are not counted


def place(number) -> float:
    "One place after another, never the same twice in a row."
    return PLACES[(7 * number + 1) % len(PLACES)]


def timed_move(explorer, ratio) -> tuple:  # milliseconds by the clock on the wall and of CPU time
    "Move the slider."
    started = time.perf_counter(), time.process_time()
    explorer.ratio_slider.value = ratio
    ended = time.perf_counter(), time.process_time()
    return tuple(1000 * (end - start) for start, end in zip(started, ended, strict=True))


async def time_masks(explorer, moves) -> list:
    "Moves in an event loop that is never waited for: each draws the mask, and puts off the rest."
    found = []
    for number in range(moves + WARM_UP):
        explorer.kept.clear()
        found.append(timed_move(explorer, place(number)))
    return found[WARM_UP:]


def time_all(explorer, moves) -> list:
    "Moves that are answered at once, and whole."
    found = []
    for number in range(moves + WARM_UP):
        explorer.kept.clear()
        found.append(timed_move(explorer, place(number)))
    return found[WARM_UP:]


def time_kept(explorer, moves) -> list:
    "Moves to places that were computed before."
    found = []
    for number in range(moves + WARM_UP):
        explorer.kept.clear()
        explorer.look(place(number))
        found.append(timed_move(explorer, place(number)))
    return found[WARM_UP:]


def summary(times) -> dict:
    "Medians by both clocks, and the slowest."
    wall, cpu = np.median(times, 0).tolist()
    return dict(wall_ms=wall, cpu_ms=cpu, slowest_wall_ms=max(wall for wall, _ in times))


def measure(checkpoint, store, protein, moves) -> tuple:  # architecture, figures
    "Answers of the slider for one model."
    model, meta = load_model(checkpoint)
    explorer, arch = Explorer({"model": (model, meta)}, store, protein=protein), meta["arch"]
    times = dict(
        mask=asyncio.run(time_masks(explorer, moves)),
        all=time_all(explorer, moves),
        kept=time_kept(explorer, moves),
    )
    figures = {name: summary(values) for name, values in times.items()}
    for name, row in figures.items():
        print(f"{arch} {name}: {row['wall_ms']:.0f} ms ({row['cpu_ms']:.0f} ms CPU)")
    return arch, figures | dict(parameters=sum(parameter.numel() for parameter in model.parameters()))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out", default="reports/bench/slider.json")
    parser.add_argument("--residues", type=int, default=500, help="length of the protein: the nearest there is")
    parser.add_argument("--moves", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    load, store = os.getloadavg()[0], EmbeddingStore(options.store)
    protein = int(np.argmin(abs(store.lengths - options.residues)))
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    found = dict(
        what="answer of the slider of 01_explore_masking",
        command=" ".join(["python nbs/bench/slider.py", *words]),
        protein=store.ids[protein],
        residues=int(store.lengths[protein]),
        threads=options.threads,
        moves=options.moves,
        models=dict(measure(path, store, protein, options.moves) for path in options.checkpoints),
    )
    write_json(options.out, found | dict(load_average_before=load, provenance=provenance()))
    print(options.out)


if __name__ == "__main__":
    main()
