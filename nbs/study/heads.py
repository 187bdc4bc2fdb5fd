"""What the notebooks of this folder share: a small head is trained on tokens of proteins, chosen by validation pairs,
and scores the test pairs once. Each result is a file, and is computed once."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from protmae.core import seed_for
from protmae.models.classifier import PPIClassifier
from protmae.ppi.features import TokenCache
from protmae.ppi.metrics import auroc, evaluate
from protmae.ppi.training import load_encoder
from protmae.utils.files import make_folder, write_json
from protmae.utils.processor import keep_freed_memory
from protmae.utils.progress import Progress
from protmae.utils.provenance import provenance


class Results:
    "The results in one folder, a file each."

    def __init__(self, *parts: str):  # of the folder's path; it is made
        self.folder = Path(*parts)
        make_folder(self.folder)

    def keep(self, name: str, made_of: dict, compute):
        """Compute a result, unless its file is there; the file of another store or encoder is refused.

        The result is a dict that has the items of `made_of`.
        """
        assert name.isascii() and "/" not in name, f"{name!r} cannot name a file; expected ASCII without a slash"
        file = self.folder / f"{name}.json"
        if not file.exists():
            write_json(file, compute() | provenance())
        kept = json.loads(file.read_text())
        wrong = [key for key, value in made_of.items() if kept.get(key) != value]
        assert not wrong, f"{file} is of another {' and '.join(wrong)}; pass another name or folder"

    def all(self) -> list:
        "Every result in the folder, also those of earlier calls."
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))]


class MLP(nn.Module):
    "Dense layers over the vectors of two proteins, in both orders (FC of Richoux et al., arXiv 1901.06268)."

    def __init__(self, dim, hidden=256):
        super().__init__()
        layers = [nn.Linear(dim, 2 * hidden), nn.BatchNorm1d(2 * hidden), nn.ReLU(), nn.Dropout(0.2)]
        self.protein = nn.Sequential(*layers, nn.Linear(2 * hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.pair = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1))

    def forward(self, vectors, a, b):
        "Vectors (P, D) of P proteins, and which of them each of n pairs joins -> (n,) logits."
        vectors = self.protein(vectors)
        first, second = vectors[a], vectors[b]
        both = self.pair(torch.cat([first, second], 1)) + self.pair(torch.cat([second, first], 1))
        return both[:, 0] / 2


def encoder_tokens(checkpoint, source, trained_on, proteins, with_cls: bool = False) -> dict:
    "What a frozen encoder says of the patches of some proteins: position -> (patches, E) float32, CLS before them."
    network, about = load_encoder(checkpoint, source, trained_on)
    model = PPIClassifier(network, n_heads=1, n_layers=1)
    cache = TokenCache(model, source, about["mean"], about["std"], proteins=proteins)
    skip = 0 if with_cls else cache.cls
    return {i: torch.from_numpy(cache.rows.read("tokens", i, skip)).float() for i in proteins}


def stacked(tokens: dict, proteins) -> torch.Tensor:
    "All tokens of some proteins."
    return torch.cat([tokens[i] for i in proteins])


def standardised(tokens: dict, trained_on):
    "A function: position -> tokens with mean 0 and deviation 1 over training proteins; what is constant becomes 0."
    known = stacked(tokens, trained_on)
    mean, std = known.mean(0), known.std(0)
    std[std < 1e-6 * std.max()] = 1
    return lambda i: (tokens[i] - mean) / std


@dataclass
class Tokens:
    "The tokens of all proteins of a store."

    table: torch.Tensor  # (N, T, width); padding is 0
    counts: np.ndarray  # (N,) real tokens of each

    def of(self, proteins: np.ndarray) -> tuple:
        "Proteins by position -> tokens (P, widest, width) float32, and (P, widest) bool: which are real."
        counts = torch.as_tensor(self.counts[proteins])
        width = int(counts.max())
        return self.table[proteins, :width].float(), torch.arange(width) < counts[:, None]


def fill_tokens(
    rows,  # function: a protein's position -> its tokens (T, width)
    proteins: np.ndarray,  # those that will be asked for
    total: int,  # proteins of the store
) -> Tokens:  # kept as bfloat16
    "The tokens of some proteins."
    found = {i: rows(i) for i in proteins}
    counts = np.zeros(total, np.int64)
    counts[proteins] = [len(found[i]) for i in proteins]
    table = torch.zeros(total, counts.max(), found[proteins[0]].shape[1], dtype=torch.bfloat16)
    for i in proteins:
        table[i, : counts[i]] = found[i].bfloat16()
    return Tokens(table, counts)


class HeadTraining:
    "Heads on the same tokens, pairs and budget. A head is called with tokens, mask and the places of both proteins."

    def __init__(self, labelled, parts, tokens: Tokens, seed: int, epochs: int, batch_size: int):
        self.labelled, self.parts, self.tokens = labelled, parts, tokens
        self.seed, self.epochs, self.batch_size = seed, epochs, batch_size

    def batches(self, idx, order):
        "Tokens, masks, places of both proteins and labels of so many pairs at a time."
        for start in range(0, len(idx), self.batch_size):
            chosen = idx[order[start : start + self.batch_size]]
            ends = np.concatenate([self.labelled.a[chosen], self.labelled.b[chosen]])
            proteins, place = np.unique(ends, return_inverse=True)
            label = torch.as_tensor(self.labelled.label[chosen], dtype=torch.float32)
            yield *self.tokens.of(proteins), *torch.as_tensor(place).chunk(2), label

    @torch.no_grad()
    def scores(self, model, idx) -> np.ndarray:
        "Probability of interaction of pairs by position."
        model.eval()
        found = [model(*batch[:-1]).float().sigmoid() for batch in self.batches(idx, np.arange(len(idx)))]
        return torch.cat(found).double().numpy()

    def train(self, make, name, rate, progress) -> tuple:
        "The best epoch of one learning rate: validation AUROC, epoch, weights."
        torch.manual_seed(seed_for(self.seed, "peer", name))
        model, best, train = make(self.tokens.table.shape[2]), None, self.parts.train
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
        for epoch in range(1, self.epochs + 1):
            model.train()
            order = np.random.default_rng(seed_for(self.seed, "order", epoch)).permutation(len(train))
            for *inputs, label in self.batches(train, order):
                loss = F.binary_cross_entropy_with_logits(model(*inputs), label)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                progress.update(len(label))
            val = self.parts.val
            reached = auroc(self.labelled.label[val], self.scores(model, val))
            if best is None or reached > best[0]:
                best = reached, epoch, {key: value.clone() for key, value in model.state_dict().items()}
        return best

    def choose(self, make, name: str, rates: list) -> tuple:
        "Rate and epoch by validation; the test pairs once: a dict of what was found, and the columns of test scores."
        started, parts, labelled = time.perf_counter(), self.parts, self.labelled
        with Progress(len(rates) * self.epochs * len(parts.train), name, "pairs") as progress, keep_freed_memory():
            tried = {rate: self.train(make, name, rate, progress) for rate in rates}
        rate = max(tried, key=lambda rate: tried[rate][0])
        reached, epoch, weights = tried[rate]
        seconds = time.perf_counter() - started
        model = make(self.tokens.table.shape[2])
        model.load_state_dict(weights)
        found = {part: self.scores(model, parts.parts[part]) for part in ("val", "test")}
        labels = {part: labelled.label[parts.parts[part]] for part in found}
        ends = labelled.a[parts.test], labelled.b[parts.test]
        metrics = evaluate(labels["test"], found["test"], *ends, labels["val"], found["val"], seed=self.seed)
        parameters = sum(p.numel() for p in model.parameters())
        chosen = dict(val_auroc=reached, rate=rate, epoch=epoch, parameters=parameters)
        budget = dict(rates=rates, epochs=self.epochs, batch_size=self.batch_size, seconds=seconds)
        columns = dict(pair=parts.test, a=ends[0], b=ends[1], label=labels["test"], score=found["test"])
        return dict(chosen=chosen, budget=budget, metrics=metrics), columns


def grouped(results: list, *keys) -> dict:
    "Results by the values of some keys."
    groups = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def auroc_over_seeds(group: list) -> dict:
    "AUROC of one system's results on test pairs with the ends of its interval, and on validation pairs."
    metrics = [result["metrics"] for result in group]
    value, low, high = mean_with_interval([m["auroc"] for m in metrics], [m["interval"]["auroc"] for m in metrics])
    val = float(np.mean([result["chosen"]["val_auroc"] for result in group]))
    return dict(auroc=value, low=low, high=high, val_auroc=val)


def mean_with_interval(values: list, intervals: list) -> tuple:
    "Mean of figures over seeds, and the mean ends of their intervals."
    low, high = np.mean(intervals, 0)
    return float(np.mean(values)), float(low), float(high)
