"""The study at its full schedules on one card, in one process, within minutes.

    python nbs/bench/gpu_study.py pack .carry --data DATA      # here: what is carried, under 64 MB
    python nbs/bench/gpu_study.py run .carry --out OUT --minutes 7
    python nbs/bench/gpu_study.py run .carry --tiny --out OUT  # on any machine: synthetic numbers, small networks
    python nbs/bench/gpu_study.py answer .carry --out OUT      # anywhere: intervals and differences, into study.json

protmae must be importable: `pip install -e .`, or PYTHONPATH=. where nothing may be installed. `run` needs no network.

`pack` writes sequences and pairs (DATA/b4ppi-yeast, from `protmae fetch b4ppi-yeast`), and UniRep's weights in float16.
`run` embeds the proteome with UniRep. Its PCA sees training proteins of the split at hand. Then V5, V5-S and V2 are
pretrained side by side (lanes.py, loops.py) on the training proteins of their own split. Encoders are kept after some
epochs, and a PPI head is trained on each as soon as it is there. The head's epoch is chosen on validation pairs, and
the scores of test pairs at other epochs never leave the card. What is done is written to OUT at once: study.json, and
scores.npz with validation and test scores of every run, in the order of the split's pairs. Where not all seeds of V5
can come to their end in time, the last of them goes.
"""

import argparse
import copy
import gzip
import math
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_answer import answer
from lanes import Scheduler
from loop_heads import HeadLoop
from loops import Data, PretrainLoop
from proteome import Proteome

from protmae.core import seed_for
from protmae.data.batches import split_by_protein
from protmae.embed.unirep import UniRep, find_weights
from protmae.models.classifier import IdentityEncoder
from protmae.models.hub import build, save_model, save_tensors
from protmae.models.v2 import TransformerMAE
from protmae.models.v5 import MAEEncoder
from protmae.ppi.config import config_for
from protmae.ppi.pairs import Pairs, read_pairs
from protmae.ppi.splits import make_split
from protmae.training.objectives import V2Objective, V5Objective
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

SMALL = dict(embed_dim=256, num_layers=6, nhead=8, ff_dim=1024, decoder_dim=128, decoder_layers=2, decoder_heads=4)
TINY = dict(
    v5=dict(embed_dim=32, num_layers=2, nhead=4, ff_dim=64, decoder_dim=32, decoder_layers=1, decoder_heads=4),
    v2=dict(embed_dim=32, num_layers=1, nhead=4, ff_dim=64),
)
FILES = ("proteins.fasta", "pairs.tsv")
MOST_CARRIED = 64e6  # bytes
MARGIN = 10  # seconds of the given time that are left for writing


# ---- what is carried


def pack(options):
    "Write everything that the machine with the card needs besides this repository."
    carry = options.carry
    carry.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (carry / f"{name}.gz").write_bytes(gzip.compress((options.data / "b4ppi-yeast" / name).read_bytes(), 9))
    with np.load(find_weights(), allow_pickle=False) as arrays:
        needed = [name for name in arrays.files if name == "embedding" or name.startswith("mlstm.0.")]
        np.savez_compressed(carry / "unirep.npz", **{name: arrays[name].astype("f2") for name in needed})
    sizes = {path.name: path.stat().st_size for path in sorted(carry.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {name}")
    assert sum(sizes.values()) < MOST_CARRIED, f"{sum(sizes.values()):,} bytes are too many to carry"


def tiny_pairs(ids) -> Pairs:
    "Random pairs with random labels."
    rng = np.random.default_rng(1)
    a, b = np.triu_indices(len(ids), 1)
    chosen = rng.permutation(len(a))[:2500]
    split = np.where(rng.random(len(chosen)) < 0.7, "train", "test").astype(object)
    return Pairs(ids, a[chosen], b[chosen], rng.integers(0, 2, len(chosen)).astype("i1"), split)


def make_kept_encoder(arch, sizes, state):
    "An encoder around weights that lie on the device; they are not copied."
    with torch.device("meta"):
        if arch == "v2":
            encoder = TransformerMAE(**sizes)
        else:
            encoder = MAEEncoder(**{name: size for name, size in sizes.items() if not name.startswith("decoder")})
    encoder.load_state_dict(state, assign=True)
    return encoder


def without_nan(row) -> dict:
    "JSON has no NaN."
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


# ---- the study


class Study:
    "Data of all splits on the device, the plan of all runs, and what they have found so far."

    def __init__(self, options):
        self.options, self.started = options, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_gpu, self.systems = self.device.type == "cuda", options.systems.split(",")
        self.runs, self.heads, self.results, self.scores, self.facts = [], [], [], {}, dict(splits={})
        self.written, self.v5_runs = 0.0, ()
        options.out.mkdir(parents=True, exist_ok=True)
        if self.is_gpu:
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.read_proteins()
        self.make_data()
        self.pace = Pace(self)

    def say(self, text):
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def read_proteins(self):
        "The embedded proteome and the pairs."
        carry = self.options.carry
        if self.options.tiny:
            self.proteome = Proteome(self.device)
            self.pairs, self.dim = tiny_pairs(self.proteome.ids), 32
        else:
            embedder = UniRep(carry / "unirep.npz", device=self.device)
            self.say("UniRep is on the device")
            self.proteome = Proteome(self.device, carry / "proteins.fasta.gz", embedder)
            self.pairs, self.dim = read_pairs(carry / "pairs.tsv.gz", self.proteome), 960
        self.facts["embedding"] = self.proteome.embedding
        self.say(f"embedded: {self.proteome.embedding}")

    def make_data(self):
        "Splits, and what the runs on each of them read."
        seeds = [int(seed) for seed in self.options.seeds.split(",") if seed]
        self.splits = {("C3", seed): make_split(self.pairs, "C3", seed) for seed in seeds}
        if "V5 own" in self.systems:
            self.splits["own", 0] = make_split(self.pairs, "own", 0)
        self.data, self.train = {}, {}
        pooled = self.proteome.pooled()
        for key in self.splits:
            self.make_data_of(key, pooled)
        del self.proteome.raw
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.say("data of all splits are on the device")

    def make_data_of(self, key, pooled):
        "Data of the three kinds (for V5, V2 and without an MAE) for one split."
        split, proteome = self.splits[key], self.proteome
        self.train[key] = train = self.pairs.proteins_of(split.train)
        matrix, centre, kept = proteome.projection(train, self.dim)
        five, two = (
            split_by_protein(proteome, 0.1, 0, objective.min_len(0.5), None, train)
            for objective in (V5Objective, V2Objective)
        )
        has_v2 = "V2" in self.systems and key[0] == "C3" and str(key[1]) in self.options.v2_seeds.split(",")
        groups = [five[0], two[0], train]
        mean, std, table = proteome.moments(matrix, centre, groups, has_v2)
        projected, real = (pooled - centre) @ matrix, proteome.real_patches()

        def data(group, **more):
            return Data(proteome.lengths, self.dim, self.device, mean=mean[group], std=std[group], **more)

        def patches(group):
            return torch.where(real, (projected - mean[group]) / std[group], 0)

        self.data[key, "v5"] = data(0, train_idx=five[0], val_idx=five[1], patches=patches(0))
        self.data[key, "patches"] = data(2, patches=patches(2))
        if has_v2:
            self.data[key, "v2"] = data(1, train_idx=two[0], val_idx=two[1], table=table)
        self.facts["splits"][f"{key[0]} seed {key[1]}"] = dict(
            fingerprint=split.fingerprint,
            train=len(split.train),
            val=len(split.val),
            test=len(split.test),
            proteins=len(train),
            v5_train_proteins=len(five[0]),
            v5_val_proteins=len(five[1]),
            pca_variance_kept=kept,
        )

    # ---- the plan

    def plan(self):
        "All pretraining runs, and the heads that need none."
        options = self.options
        until = self.started + 60 * options.minutes - (0 if options.tiny else MARGIN)
        self.scheduler = Scheduler(until, self.said, self.tick)
        c3, first = [key for key in self.splits if key[0] == "C3"], self.first_weights()
        best = {"best"} if options.best else set()
        keep = {int(epoch) for epoch in options.keep.split(",")} | {options.v5_epochs} | best
        if "V5" in self.systems:
            for key in c3:
                self.add_pretraining(
                    "V5", "v5", key, keep, model=copy.deepcopy(first), priority=-1, epochs=options.v5_epochs
                )
        self.v5_runs = tuple(run.name for run in self.runs)
        if "V2" in self.systems:
            keep_v2 = {0, options.v2_epochs} | best
            for key in c3:
                if (key, "v2") in self.data:
                    self.add_pretraining("V2", "v2", key, keep_v2, depth=8, priority=-1, epochs=options.v2_epochs)
        if "V5 own" in self.systems:
            self.add_pretraining("V5", "v5", ("own", 0), keep, model=copy.deepcopy(first), epochs=options.v5_epochs)
        if "V5-S" in self.systems:
            self.add_small(c3)
        if "no MAE" in self.systems:
            for key in self.splits:
                make = partial(IdentityEncoder, self.dim)
                self.add_head("no MAE", key, self.data[key, "patches"], make, dict(arch="patches"))
        self.say(f"{len(self.runs)} pretraining runs are planned")

    def first_weights(self):
        "The full V5 as all of its runs begin, made once."
        if self.options.tiny:
            return None
        torch.manual_seed(seed_for(0, "weights"))
        return build("v5", input_dim=self.dim).to(self.device)

    def add_small(self, keys):
        "V5-S on each split."
        changes = dict(epochs=self.options.v5_epochs, batch_size=64, lr=1e-3)
        for key in keys:
            run = self.add_pretraining("V5-S", "v5", key, {0, self.options.v5_epochs}, sizes=SMALL, **changes)
            run.needs = self.v5_runs if self.options.small_last else ()

    def add_pretraining(self, system, arch, key, keep, sizes=None, **more):
        "One pretraining run."
        sizes = TINY[arch] if self.options.tiny else sizes
        on_keep = partial(self.add_heads_of_kept, key, system)
        name, data = f"{system}, {key[0]} seed {key[1]}", self.data[key, arch]
        run = PretrainLoop(name, arch, data, self.device, sizes=sizes, keep=keep, on_keep=on_keep, **more)
        self.runs.append(run)
        self.scheduler.add(run)
        return run

    def add_head(self, system, key, data, make_encoder, about, after=None, lora=False, keep_head=False):
        "One PPI head."
        more = dict(finetune="lora") if lora else {}
        config = config_for(epochs=self.options.head_epochs, batch_size=256, seed=key[1], **more)
        head = HeadLoop(
            f"{system}, {key[0]} seed {key[1]}",
            data,
            self.pairs,
            self.splits[key],
            config,
            make_encoder,
            self.train[key],
            self.device,
            lora=lora,
            after=after,
            keep_head=keep_head,
            about=dict(system=system) | about,
        )
        if lora:
            head.kind, head.most, head.rank = "lora", 1, 5
        if head.name in self.options.late.split(";"):
            head.needs, head.rank = self.v5_runs, 3
        self.heads.append(head)
        self.scheduler.add(head)

    def add_heads_of_kept(self, key, system, run, which):
        "Heads for an encoder that was just kept; `which` is the number of epochs, or 'best'."
        label = self.label_of(system, run, which)
        if label is None:
            return
        after = None
        if run.lane.stream:
            after = torch.cuda.Event()
            after.record(run.lane.stream)
        make = partial(make_kept_encoder, run.arch, dict(run.sizes), run.kept[which])
        arch = "v5.2" if run.arch == "v2" else "v5"
        about = dict(encoder=run.name, arch=arch, pretraining_epochs=which)
        is_last = which == run.config.epochs
        self.add_head(label, key, run.data, make, about, after, keep_head=is_last and system == "V5-S")
        if is_last and system == "V5" and self.options.lora and key[0] == "C3":
            self.add_head(f"{label}, LoRA", key, run.data, make, about | dict(lora=True), after, lora=True)

    @staticmethod
    def label_of(system, run, which) -> str:  # None: the best epoch is the last, which has its head already
        "What a kept encoder is called."
        if which != "best":
            return f"{system} {which} epochs" if which else f"{system} untrained"
        rows = run.log()
        best = min(rows, key=lambda row: row["val_loss"])["epoch"]
        return None if best == len(rows) else f"{system} best ({best} epochs)"

    # ---- while it runs

    def said(self, text):
        "Something has ended: say so, and take over what it has found."
        self.say(text)
        for head in self.heads:
            if head.result is not None and head.name not in self.scores:
                self.results.append(head.result)
                self.scores[head.name] = head.kept_scores
        if time.perf_counter() - self.written > 5:
            self.write()

    def tick(self):
        "Called by the scheduler all the time."
        if time.perf_counter() - self.written > 10:
            self.write()
        if not self.options.tiny:
            self.pace.look()

    def about_run(self, run) -> dict:
        "Settings and log of a pretraining run."
        return dict(
            name=run.name,
            arch=run.arch,
            config=asdict(run.config),
            parameters=sum(parameter.numel() for parameter in run.parameters),
            train_proteins=run.n,
            steps_per_epoch=run.steps_per_epoch,
            log=[without_nan(row) for row in run.log()],
            seconds=self.scheduler.done.get(run.name),
        )

    def write(self, is_last=False):
        "Everything that was found so far."
        self.written = time.perf_counter()
        waiting = [run.name for run in self.scheduler.waiting]
        found = dict(
            command="python nbs/bench/gpu_study.py " + " ".join(sys.argv[1:]),
            tiny=self.options.tiny,
            finished=is_last,
            seconds=time.perf_counter() - self.started,
            peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9 if self.is_gpu else None,
            **self.facts,
            pretraining=[self.about_run(run) for run in self.runs if run.name not in waiting],
            results=self.results,
            failed=self.scheduler.failed,
            provenance=provenance(),
        )
        write_json(self.options.out / "study.json", found)
        arrays = {f"{name}|{part}": v for name, scores in self.scores.items() for part, v in scores.items()}
        tmp = self.options.out / "scores.tmp.npz"
        np.savez_compressed(tmp, **arrays)
        tmp.replace(self.options.out / "scores.npz")

    def save_small(self):
        "The small V5 of C3, seed 0, and its head, in float16."
        out, note = self.options.out, "float16; UniRep, PCA of the C3 seed 0 training proteins"
        for run in self.runs:
            if run.name == "V5-S, C3 seed 0" and run.name in self.scheduler.done:
                state = {name: value.half() for name, value in run.state(run.model).items()}
                mean, std = run.data.mean.cpu().numpy(), run.data.std.cpu().numpy()
                path, config = out / "v5s-c3-seed0.f16.safetensors", asdict(run.config)
                save_model(path, state, "v5", run.sizes, mean, std, config=config, note=note)
        for head in self.heads:
            if head.result and head.keep_head and head.head and head.split.seed == 0:
                half = {name: value.half() for name, value in head.head.items()}
                save_tensors(out / "v5s-c3-seed0.head.f16.safetensors", half, dict(note=note))

    def run(self):
        "All of it."
        self.plan()
        self.scheduler.run()
        self.said("stopped" if self.scheduler.live else "all is done")
        self.write(is_last=True)
        try:
            self.save_small()
        except Exception as e:
            self.say(f"no weights: {e}")
        self.say(f"failed: {self.scheduler.failed or 'nothing'}")


class Pace:
    "Where not all seeds of V5 can come to their end in time, the last of them goes."

    def __init__(self, study):
        self.study, self.looked, self.dropped, self.mark = study, 0.0, study.started - 20, None

    def look(self):
        "Every five seconds, and not soon after a run was stopped."
        now = time.perf_counter()
        if now - self.looked < 5:
            return
        self.looked = now
        runs = [run for run in self.study.scheduler.live if run.name in self.study.v5_runs]
        if runs and now - self.dropped > 25:
            self.compare_with_mark(now, runs)

    def compare_with_mark(self, now, runs):
        "How fast the epochs end: 20 of them since the mark say it."
        names, slowest = [run.name for run in runs], min(run.epochs_ended() for run in runs)
        if self.mark is None or self.mark[1] != names:
            self.mark = now, names, slowest
            return
        began, _, before = self.mark
        if slowest - before < 20:
            return
        rate = (slowest - before) / (now - began)
        end = now + (runs[0].config.epochs - slowest) / rate
        self.study.say(f"V5 is at epoch {slowest}; at {rate:.2f} epochs/s it ends at {end - self.study.started:.0f} s")
        if end > self.study.scheduler.until - 15 and len(runs) > 1:
            self.stop(runs[-1])
            self.dropped, self.mark = now, None

    def stop(self, run):
        "This run goes, and nothing waits for it."
        study = self.study
        study.scheduler.drop(run, f"stopped after {run.epochs_ended()} epochs: no time for it")
        study.v5_runs = tuple(name for name in study.v5_runs if name != run.name)
        for job in study.scheduler.waiting:
            job.needs = tuple(name for name in job.needs if name != run.name)
        study.say(f"{run.name} is stopped: no time for it")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "run", "answer"))
    parser.add_argument("carry", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--minutes", type=float, default=7, help="for `run`, once everything is imported")
    parser.add_argument("--v5-epochs", type=int, default=100)
    parser.add_argument("--v2-epochs", type=int, default=60)
    parser.add_argument("--head-epochs", type=int, default=6)
    parser.add_argument("--keep", default="0,3,12,30,100", help="epochs after which V5 is kept")
    parser.add_argument("--seeds", default="0,1,2", help="of the C3 splits")
    parser.add_argument("--v2-seeds", default="0")
    parser.add_argument("--lora", type=int, default=1, help="0: no LoRA")
    parser.add_argument("--systems", default="V5,V2,V5-S,V5 own,no MAE", help="which of these")
    parser.add_argument("--late", default="", help="heads that begin when V5 is done, semicolon between")
    parser.add_argument("--best", type=int, default=1, help="0: do not keep the encoder of the best epoch")
    parser.add_argument("--small-last", action="store_true", help="V5-S begins when V5 is done")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap of `answer`")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse(argv)
    if options.what == "pack":
        pack(options)
    elif options.what == "run":
        Study(options).run()
    else:
        answer(options.carry, options.out, options.v2_epochs, options.resamples)


if __name__ == "__main__":
    main()
