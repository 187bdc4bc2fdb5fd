"""Do numbers in bfloat16 mean the same as those in float32? Pretraining of V5, and scores of a classifier.

    python nbs/bench/precision.py STORE [--run RUN] [--proteins 1000] [--epochs 5] [--seeds 3]

The full V5 is trained on some proteins of STORE in both precisions, from the same seeds: the curves of validation loss
and skill are compared with how far two seeds lie apart. RUN is a run of 04_train_ppi on STORE that was tested: its test
pairs are scored in both precisions.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from protmae.data.store import EmbeddingStore
from protmae.ppi.prediction_run import PredictionRequest, predict_pairs
from protmae.training.pretrain import PretrainTrainer
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

PRECISIONS = ("float32", "bf16")


def curves(store, options, folder) -> dict:
    "Validation loss and skill after each epoch, by precision and seed."
    found = {precision: [] for precision in PRECISIONS}
    for seed in range(options.seeds):
        for precision in PRECISIONS:
            settings = dict(epochs=options.epochs, max_proteins=options.proteins, seed=seed, precision=precision)
            sizes = dict(embed_dim=256, num_layers=2, nhead=4, ff_dim=256) if options.tiny else None
            run = PretrainTrainer("v5", store, folder / f"{precision}-{seed}", sizes=sizes, cpu=True, **settings)
            found[precision].append([dict(loss=row["val_loss"], skill=row["skill"]) for row in run.fit()])
    return found


def compare(found) -> dict:
    "The largest difference between precisions in any epoch, and between seeds."
    result = {}
    for name in ("loss", "skill"):
        values = np.array([[[row[name] for row in run] for run in found[p]] for p in PRECISIONS])  # (2, seeds, epochs)
        spread = float(np.ptp(values[0], axis=0).max())
        result[name] = dict(
            largest_difference_of_precisions=float(np.abs(values[1] - values[0]).max()),
            last_epoch=float(np.abs(values[1] - values[0])[:, -1].max()),
            largest_difference_of_seeds=spread,
        )
    return result


def scores(store, run, folder) -> dict:
    "AUROC of the test pairs of a run in both precisions, and how far logits are apart."
    tested = np.load(run / "test_scores.npz")
    names = {f"id_{end}": [store.ids[i] for i in tested[end]] for end in "ab"}
    pd.DataFrame(names).to_csv(folder / "pairs.tsv", sep="\t", index=False)
    request = PredictionRequest(pairs=str(folder / "pairs.tsv"), store=str(store.path))
    logits = {}
    for precision in PRECISIONS:
        out = folder / f"{precision}.tsv"
        predict_pairs(run, request, out, precision=precision)
        probability = pd.read_csv(out, sep="\t").probability
        logits[precision] = (np.log(probability) - np.log1p(-probability)).to_numpy()
    auroc = {precision: roc_auc_score(tested["label"], values) for precision, values in logits.items()}
    error = (logits["bf16"] - logits["float32"]).std() / logits["float32"].std()
    facts = json.loads((run / "test.json").read_text())
    about = dict(arch=facts["arch"], split=facts["kind"], seed=facts["seed"], pairs=len(tested["label"]))
    return about | dict(auroc=auroc, logit_difference_over_spread=float(error))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--proteins", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small V5: to see that it runs")
    parser.add_argument("--out", default="reports/bench/precision.json")
    return parser.parse_args()


def main():
    options = parse()
    store = EmbeddingStore(options.store)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        report = dict(proteins=options.proteins, epochs=options.epochs, tiny=options.tiny)
        if options.run:
            report["scores"] = scores(store, options.run, folder)
        if options.seeds:
            report["curves"] = curves(store, options, folder)
            report["training"] = compare(report["curves"])
    write_json(options.out, report | dict(fingerprint=store.fingerprint, provenance=provenance()))
    print(json.dumps({name: report[name] for name in ("scores", "training") if name in report}, indent=1))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
