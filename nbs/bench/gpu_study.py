"""The whole study on a machine that is lent for minutes: no network, no Jupyter, little to carry.

    python nbs/bench/gpu_study.py pack .carry             # here, with the data at hand: what is carried, under 64 MB
    python nbs/bench/gpu_study.py run .carry --out OUT    # there, again and again until it says that all is done
    python nbs/bench/gpu_study.py run .carry --tiny       # to see that it runs, on any machine: synthetic data, small networks

`pack` writes sequences (gz), pairs (gz), UniRep's weights in float16, the splits (those by similarity need MMseqs2, which the other machine lacks) and the
pure-Python wheels fastcore and plotly. `run` needs torch, accelerate, h5py, numpy, pandas, scikit-learn, safetensors, PyYAML and tqdm. It embeds the
sequences (once), then runs the jobs of nbs/study-gpu.yaml, and stops after --minutes; all of its state lies in --work, so the same call goes on as long as
that folder lives. In OUT it leaves study.json, .md, .html, results.tar.gz (every job's JSON, log and test scores) and, in float16, the weights of encoders
that fit 16 MB. Should the folder be lost between two calls, `--unpack results.tar.gz` brings back which PPI jobs are done; encoders train again.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

start, root = time.perf_counter(), Path(__file__).resolve().parents[2]
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("what", choices=("pack", "run"))
p.add_argument("carry", type=Path)
p.add_argument(
    "--data", type=Path, default=root / "data", help="pack: where yeast.h5, b4ppi-yeast/ and study/splits/ lie"
)
p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
p.add_argument("--work", type=Path, default=Path("/tmp/protmae-study"))
p.add_argument("--minutes", type=float, default=7)
p.add_argument("--workers", type=int, help="PPI jobs at a time (default: 4 with a GPU)")
p.add_argument("--plan", type=Path, default=root / "nbs/study-gpu.yaml")
p.add_argument("--unpack", type=Path)
p.add_argument("--tiny", action="store_true")
a = p.parse_args()


def pack():
    import numpy as np

    from protmae.embed.unirep import find_weights

    a.carry.mkdir(parents=True, exist_ok=True)
    for f in ("proteins.fasta", "pairs.tsv"):
        (a.carry / f"{f}.gz").write_bytes(gzip.compress((a.data / "b4ppi-yeast" / f).read_bytes(), 9))
    with np.load(find_weights(), allow_pickle=False) as z:
        np.savez_compressed(
            a.carry / "unirep.npz",
            **{k: z[k].astype("f2") for k in z.files if k == "embedding" or k.startswith("mlstm.0.")},
        )
    with tarfile.open(a.carry / "splits.tar.gz", "w:gz") as t:
        for f in sorted((a.data / "study/splits").iterdir()):
            t.add(f, f"splits/{f.name}")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            str(a.carry),
            "fastcore<2",
            "plotly>=6",
        ],
        check=True,
    )
    size = sum(f.stat().st_size for f in a.carry.iterdir())
    print(
        *(f"{f.stat().st_size / 1e6:8.2f} MB  {f.name}" for f in sorted(a.carry.iterdir())),
        f"{size / 1e6:8.2f} MB in all",
        sep="\n",
    )
    assert size < 64e6


def wheels():
    "The carried packages where this Python has none of its own; jobs inherit the path."
    into = a.work / "wheels"
    into.mkdir(parents=True, exist_ok=True)
    for w in sorted(a.carry.glob("*.whl")):
        if not (into / w.stem).exists():
            zipfile.ZipFile(w).extractall(into / w.stem)
    sys.path[:0] = [str(root)]
    sys.path += [str(d) for d in into.iterdir()]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(root), os.environ.get("PYTHONPATH"), *(str(d) for d in into.iterdir())])
    )


def data():
    "The store and the pairs: embedded here, on the GPU if there is one."
    from protmae.data.store import EmbeddingStore
    from protmae.embed.run import embed_fasta
    from protmae.embed.unirep import UniRep

    store, pairs = a.work / "yeast.h5", a.work / "pairs.tsv"
    if a.tiny:
        from protmae.data.synthetic import make_demo_store

        store = a.work / "demo.h5"
        if not store.exists():
            make_demo_store(store, n=120, dim=48)
        return store, a.work / "demo.pairs.tsv"
    if not pairs.exists():
        pairs.write_bytes(gzip.decompress((a.carry / "pairs.tsv.gz").read_bytes()))
    splits = a.work / "study/splits"
    if not splits.exists():
        with tarfile.open(a.carry / "splits.tar.gz") as t:
            t.extractall(a.work / "study", filter="data")
    if not (a.work / "embedded").exists():
        fitted = set(
            (splits / "proteins-seen.txt").read_text().split()
        )  # PCA sees proteins of training pairs of the table's own split
        t = time.perf_counter()
        embed_fasta(
            str(a.carry / "proteins.fasta.gz"), str(store), UniRep(a.carry / "unirep.npz"), dim=960, pca_ids=fitted
        )
        s = EmbeddingStore(store)
        (a.work / "embedded").write_text(
            json.dumps(dict(proteins=len(s), residues=int(s.lengths.sum()), seconds=time.perf_counter() - t))
        )
    print((a.work / "embedded").read_text(), flush=True)
    return store, pairs


def plan_here(store, pairs):
    "The plan with this machine's places."
    import yaml

    from protmae.viz.study import read_plan

    t = yaml.safe_load(a.plan.read_text())
    here = a.work / "plan.yaml"
    if a.tiny:
        small = dict(
            v5=dict(embed_dim=48, num_layers=1, nhead=4, ff_dim=48, decoder_dim=16, decoder_layers=1, decoder_heads=2),
            v2=dict(embed_dim=48, num_layers=1, nhead=4, ff_dim=48),
        )
        for e in t["encoders"].values():
            e |= dict(
                epochs=1,
                batch_size=16,
                sizes=small["v5" if e["notebook"] == "03_train_v5" else "v2"]
                | {k: v for k, v in e.get("sizes", {}).items() if k == "patching"},
            )
        for s in t["systems"].values():
            s |= dict(epochs=1) if s["arch"] != "baselines" else {}
        t["stages"] = [
            dict(t["stages"][0], splits=["C3"], seeds=[0], systems=["V5", "V5.2", "no MAE", "baselines"]),
            dict(t["stages"][1], seeds=[0], systems=["V5-S adaptive", "V5 fine-tuned"]),
        ]
    t |= dict(store=str(store), pairs=str(pairs), out=str(a.work / "study"))
    here.write_text(yaml.safe_dump(t))
    plan = read_plan(here)
    plan["nbs"] = root / "nbs"
    return plan


def bring_back(plan):
    "What leaves this machine."
    import torch
    from safetensors.torch import load_file, save_file

    from protmae.viz.study import plan_jobs
    from protmae.viz.study_page import n_parameters, study_report

    a.out.mkdir(parents=True, exist_ok=True)
    jobs = plan_jobs(plan)
    with tarfile.open(a.out / "results.tar.gz", "w:gz") as t:
        for f in sorted(plan["out"].rglob("*")):
            if f.is_file() and f.suffix in (".json", ".jsonl", ".npz", ".log") and "state" not in f.parts:
                t.add(f, f.relative_to(plan["out"]))
    for f in [
        f
        for j in jobs
        if j.done and j.name.startswith("pretrain")
        for f in j.folder.glob("*/best.safetensors")
        if n_parameters(f) * 2 < 16e6
    ][:3]:
        save_file({k: v.half() for k, v in load_file(f).items()}, a.out / f"{f.parents[1].name}.f16.safetensors")
    study_report(
        plan, a.out / "study.json", resamples=200
    )  # last, and with few resamples: intervals of every pair of systems take minutes
    left = [j.name for j in jobs if not j.done]
    print(
        f"{len(jobs) - len(left)} of {len(jobs)} jobs are done" + (f"; next: {left[0]}" if left else ": all of it"),
        flush=True,
    )
    dev = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    (a.out / "machine.json").write_text(
        json.dumps(
            dict(
                device=dev,
                torch=torch.__version__,
                seconds=time.perf_counter() - start,
                embedded=(a.work / "embedded").read_text() if (a.work / "embedded").exists() else None,
                left=len(left),
            )
        )
    )


def run():
    a.work.mkdir(parents=True, exist_ok=True)
    wheels()
    import torch

    from protmae.viz.study import run_study

    if a.unpack:
        with tarfile.open(a.unpack) as t:
            t.extractall(a.work / "study", [m for m in t if m.name.startswith("ppi/")], filter="data")
    plan = plan_here(*data())
    gpu = torch.cuda.is_available()
    rest = lambda: a.minutes - (time.perf_counter() - start) / 60 - 0.5  # half a minute for the report
    if rest() > 0:
        run_study(plan, 2 if gpu else a.workers or 1, rest(), True, "pretrain", say=lambda s: print(s, flush=True))
    if rest() > 0:
        run_study(plan, a.workers or (4 if gpu else 1), rest(), True, say=lambda s: print(s, flush=True))
    bring_back(plan)


dict(pack=pack, run=run)[a.what]()
