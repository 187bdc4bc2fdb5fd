"""Intervals by a bootstrap over proteins, and paired differences, from the scores that gpu_study.py has left."""

import json
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from protmae.data.fasta import clean_sequences, read_sequences
from protmae.ppi.metrics import auroc, evaluate, paired_bootstrap_seeds
from protmae.ppi.pairs import read_pairs
from protmae.ppi.splits import make_split
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

SPLITS = ("C3", "own")
MIDDLE = (3, 12, 30)  # epochs of V5 that the last one is compared with


class Tested(NamedTuple):
    "Scores of one run on the test pairs of its split."

    label: np.ndarray  # (n,)
    score: np.ndarray  # (n,)
    a: np.ndarray  # (n,) proteins
    b: np.ndarray  # (n,)
    metrics: dict  # from `evaluate`


def check_fingerprint(split, study):
    "Refuse pairs that are split otherwise than in the run."
    expected = study["splits"][f"{split.kind} seed {split.seed}"]["fingerprint"]
    assert split.fingerprint == expected, f"{split!r} differs from the split of the run, {expected}"


def evaluate_runs(study, scores, pairs, resamples) -> dict:  # (system, split) -> seed -> `Tested`
    "Metrics of every run, also written into its row."
    splits, tested = {}, defaultdict(dict)
    for row in study["results"]:
        key, name = (row["split"], row["seed"]), row["name"]
        if key not in splits:
            splits[key] = make_split(pairs, *key)
            check_fingerprint(splits[key], study)
        split, score = splits[key], scores[f"{name}|test"]
        label, val_label = (pairs.label[part].astype(int) for part in (split.test, split.val))
        assert abs(auroc(label, score) - row["test_auroc"]) < 1e-6, name
        a, b = pairs.a[split.test], pairs.b[split.test]
        row["metrics"] = evaluate(label, score, a, b, val_label, scores[f"{name}|val"], resamples, row["seed"])
        tested[row["system"], row["split"]][row["seed"]] = Tested(label, score, a, b, row["metrics"])
    return tested


def table_row(system, split, runs) -> dict:
    "Means over the seeds of one system."
    metrics = [runs[seed].metrics for seed in sorted(runs)]

    def mean(name):
        return round(float(np.mean([row[name] for row in metrics])), 4)

    def interval(name):
        return [round(float(np.mean([row["interval"][name][end] for row in metrics])), 4) for end in (0, 1)]

    return dict(
        system=system,
        split=split,
        seeds=sorted(runs),
        auroc=mean("auroc"),
        auroc_interval=interval("auroc"),
        auprc=mean("auprc"),
        auprc_interval=interval("auprc"),
        auprc_1to10=mean("auprc_1to10"),
        val_auroc=mean("val_auroc"),
        auroc_of_seeds=[row["auroc"] for row in metrics],
        val_auroc_of_seeds=[row["val_auroc"] for row in metrics],
    )


def epochs_of(log) -> int:
    "How many epochs a log has, written as columns or as rows."
    return log["epoch"][-1] if isinstance(log, dict) else log[-1]["epoch"]


def questions(study, v2_epochs) -> list:  # of pairs of systems
    "Which differences are asked for."
    logs = [run["log"] for run in study["pretraining"] if run["name"].startswith("V5,")]
    last = max(map(epochs_of, logs), default=0)
    full, small, kept = f"V5 {last} epochs", f"V5-S {last} epochs", [f"V5 {epochs} epochs" for epochs in MIDDLE]
    asked = [(full, "V5 untrained"), (full, "no MAE"), *((full, one) for one in kept), (full, small)]
    asked += [(one, other) for other in ("V5 untrained", "no MAE") for one in kept]
    asked += [(small, other) for other in ("V5-S untrained", "no MAE", "V5 12 epochs")]
    return [*asked, (f"V2 {v2_epochs} epochs", full)]


def difference(one, two, split, tested, resamples) -> dict:  # None where no seed has both
    "The paired difference of two systems."
    ours, theirs = (tested.get((system, split), {}) for system in (one, two))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    tests = [(ours[s].label, ours[s].score, theirs[s].score, ours[s].a, ours[s].b) for s in seeds]
    mean, each = paired_bootstrap_seeds(tests, resamples)
    val = [ours[seed].metrics["val_auroc"] - theirs[seed].metrics["val_auroc"] for seed in seeds]
    word = "better" if mean.low > 0 else "worse" if mean.high < 0 else "not distinguishable"
    return dict(
        one=one,
        two=two,
        split=split,
        seeds=seeds,
        auroc=mean.difference,
        low=mean.low,
        high=mean.high,
        word=word,
        of_seeds=[found.difference for found in each],
        val_auroc=float(np.mean(val)),
        val_of_seeds=val,
    )


def answer(carry, out, v2_epochs, resamples=1000):
    "Write metrics, the table and the differences into `out`/study.json."
    ids = clean_sequences(read_sequences(carry / "proteins.fasta.gz"))[0]
    pairs = read_pairs(carry / "pairs.tsv.gz", SimpleNamespace(ids=ids))
    study, scores = json.loads((out / "study.json").read_text()), dict(np.load(out / "scores.npz"))
    tested = evaluate_runs(study, scores, pairs, resamples)
    rows = [table_row(*system_and_split, runs) for system_and_split, runs in tested.items()]
    study["table"] = sorted(rows, key=lambda row: (row["split"], -row["auroc"]))
    study["differences"] = []
    for one, two in questions(study, v2_epochs):
        for found in filter(None, [difference(one, two, split, tested, resamples) for split in SPLITS]):
            study["differences"].append(found)
            print(
                f"{one} - {two}, {found['split']}, seeds {found['seeds']}: {found['auroc']:+.4f} "
                f"({found['low']:+.4f} to {found['high']:+.4f}), {found['word']}; "
                f"validation {found['val_auroc']:+.4f}",
                flush=True,
            )
    study["answered"] = dict(resamples=resamples, provenance=provenance())
    write_json(out / "study.json", study)
    for row in study["table"]:
        print(*(row[name] for name in ("split", "system", "seeds", "auroc", "auroc_interval", "auprc", "val_auroc")))
