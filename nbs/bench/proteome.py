"""A proteome whose hidden states lie on the device, for gpu_study.py: pooled, projected and standardised there."""

import time

import numpy as np
import torch

from protmae.core import N_PATCHES, PATCH_SIZE, seed_for
from protmae.data.fasta import clean_sequences, read_sequences
from protmae.embed.run import token_batches

SYNTHETIC = 150  # proteins of the proteome that is made for tests
ROWS_AT_ONCE = 100_000  # residues that are projected together


def random_sequences() -> tuple:  # ids and sequences
    "A small synthetic proteome."
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, SYNTHETIC)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in lengths]
    return [f"P{i}" for i in range(SYNTHETIC)], sequences


class Proteome:
    "Sequences, and their hidden states as float16 rows on the device."

    def __init__(
        self,
        device,
        fasta=None,  # None: synthetic sequences
        embedder=None,  # `UniRep`; None: random numbers
    ):
        self.device, self.path = device, fasta
        self.ids, self.sequences = clean_sequences(read_sequences(fasta))[:2] if fasta else random_sequences()
        self.lengths = np.array([len(sequence) for sequence in self.sequences])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        started = time.perf_counter()
        if embedder is None:
            self.raw = torch.randn(int(self.starts[-1]), 48).half().to(device)
        else:
            self.raw = self.embedded(embedder)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds, residues = time.perf_counter() - started, int(self.starts[-1])
        self.embedding = dict(proteins=len(self.ids), residues=residues, dim=self.raw.shape[1], seconds=seconds)
        self.embedding["residues_per_s"] = residues / seconds

    def __len__(self):
        return len(self.ids)

    def embedded(self, embedder) -> torch.Tensor:
        "(residues, dim) float16"
        raw = torch.empty(int(self.starts[-1]), embedder.dim, dtype=torch.float16, device=self.device)
        for batch in token_batches(self.lengths.tolist(), max_tokens=260_000, max_proteins=256):
            states, order, lengths = embedder.states([self.sequences[i] for i in batch])
            for column, place in enumerate(order):
                i = batch[place]
                raw[self.starts[i] : self.starts[i + 1]] = states[: lengths[column], column]
        return raw

    def pooled(self) -> torch.Tensor:
        "Means of windows of 32 residues, (N, 47, width) float32."
        out = torch.zeros(len(self), N_PATCHES, self.raw.shape[1], device=self.device)
        lengths, starts = (torch.as_tensor(v).to(self.device) for v in (self.lengths, self.starts[:-1]))
        place = torch.arange(N_PATCHES * PATCH_SIZE, device=self.device)
        for i in range(0, len(self), 32):
            part = slice(i, i + 32)
            rows = (starts[part, None] + place).clamp(max=len(self.raw) - 1)
            real = place < lengths[part, None]
            windows = torch.where(real[..., None], self.raw[rows].float(), 0).unflatten(1, (N_PATCHES, PATCH_SIZE))
            counts = real.unflatten(1, (N_PATCHES, PATCH_SIZE)).sum(2).clamp(min=1)
            out[part] = windows.sum(2) / counts[..., None]
        return out

    def real_patches(self) -> torch.Tensor:
        "(N, 47, 1) bool"
        counts = torch.as_tensor(-(-self.lengths // PATCH_SIZE))[:, None]
        return (torch.arange(N_PATCHES) < counts)[..., None].to(self.device)

    def projection(self, proteins, dim, residues=60_000) -> tuple:  # matrix, mean, share of the variance
        "PCA on a sample of these proteins, drawn as `protmae.embed.run.fit_projection` draws it."
        order = proteins[np.random.default_rng(seed_for(0, "pca")).permutation(len(proteins))]
        before = np.concatenate([[0], np.cumsum(self.lengths[order])[:-1]])
        sample = order[before < residues]
        x = torch.cat([self.raw[self.starts[i] : self.starts[i + 1]] for i in sample]).double()
        mean = x.mean(0)
        x = x - mean
        values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))
        values, vectors = values.flip(0), vectors.flip(1)
        kept = float(values[:dim].sum() / values.sum())
        return vectors[:, :dim].float().contiguous(), mean.float(), kept

    def moments(self, matrix, centre, groups, keep=False) -> tuple:  # (groups, dim) twice, (residues, dim) or None
        "Mean and deviation of the projected residues of groups of proteins; the residues themselves where asked for."
        lengths = torch.as_tensor(self.lengths)
        owner = torch.repeat_interleave(torch.arange(len(self)), lengths).to(self.device)
        member = torch.zeros(len(groups), len(self), device=self.device)
        for row, group in zip(member, groups, strict=True):
            row[torch.as_tensor(group).to(self.device)] = 1
        total = squares = count = 0
        shape = len(self.raw), matrix.shape[1]
        table = torch.empty(shape, dtype=torch.float16, device=self.device) if keep else None
        for i in range(0, len(self.raw), ROWS_AT_ONCE):
            part = slice(i, i + ROWS_AT_ONCE)
            projected = ((self.raw[part].float() - centre) @ matrix).half()
            if keep:
                table[part] = projected
            weights, projected = member[:, owner[part]].double(), projected.double()
            total, squares = total + weights @ projected, squares + weights @ projected.square()
            count = count + weights.sum(1, keepdim=True)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        std[std < 1e-6 * std.amax(1, keepdim=True)] = 1
        return mean.float(), std.float(), table
