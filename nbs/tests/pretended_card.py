"""A pretended card: the library's own steps on fake CUDA tensors, on a machine without one.

Under torch's FakeTensorMode tensors have shapes, dtypes and devices, and no values: whatever asks for a value on the
host, or mixes devices, raises. `pretended_card.cpp` lets torch's CPU build run backward passes of such tensors.

    python pretended_card.py FOLDER     # every case: a line of JSON each, in the folder's stores

Import it in a process of its own, and before torch: what it changes in torch stays changed.
"""

import contextlib
import ctypes
import functools
import importlib.util
import json
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def build_guard(folder) -> Path:
    "Compile the device guard with g++: 15 seconds."
    library = Path(folder) / "pretended_card.so"
    include, lib = TORCH / "include", TORCH / "lib"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    links = [f"-L{lib}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    subprocess.run(["g++", *flags, str(HERE / "pretended_card.cpp"), *links], check=True)
    return library


def load_guard(library):
    "Before torch is imported, so that it finds the guard when it looks for one."
    assert "torch" not in sys.modules, "pretended_card must be imported before torch"
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(TORCH / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_guard(build_guard(sys.argv[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (refuses to be imported after `pretend_cuda`)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from transformers import EsmConfig, EsmModel, EsmTokenizer  # noqa: E402

from protmae.data.patches import PatchCache  # noqa: E402
from protmae.data.synthetic import make_demo_store  # noqa: E402
from protmae.embed.language_models import LanguageModel  # noqa: E402
from protmae.embed.unirep import UniRep  # noqa: E402
from protmae.models.classifier import IdentityEncoder  # noqa: E402
from protmae.models.v2 import TINY_V2, TransformerMAE  # noqa: E402
from protmae.models.v5 import TINY_V5, MAEEncoder  # noqa: E402
from protmae.ppi import training  # noqa: E402
from protmae.ppi.config import config_for  # noqa: E402
from protmae.ppi.pairs import read_pairs  # noqa: E402
from protmae.ppi.scoring import ProteinFeatures, Scorer  # noqa: E402
from protmae.ppi.splits import make_split  # noqa: E402
from protmae.training import pretrain  # noqa: E402

MEMORY = 80 * 2**30  # bytes
LINEAR_MAPS = {"mm", "addmm"}  # attention itself is not looked at: torch's CPU build has only the version in float32


def pretend_cuda():
    "What the library and accelerate ask torch.cuda."
    cuda, nothing = torch.cuda, lambda *a, **k: None
    about = dict(major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, name="pretended")
    replies = dict(
        is_available=True,
        is_initialized=True,
        device_count=1,
        current_device=0,
        is_bf16_supported=True,
        get_device_capability=(9, 0),
        get_device_name="pretended",
        mem_get_info=(MEMORY, MEMORY),
        get_device_properties=SimpleNamespace(**about),
        is_current_stream_capturing=False,
        max_memory_allocated=0,
    )
    for name, reply in replies.items():
        setattr(cuda, name, lambda *a, reply=reply, **k: reply)
    for name in ("_lazy_init", "set_device", "manual_seed", "manual_seed_all", "synchronize", "empty_cache"):
        setattr(cuda, name, nothing)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.amp.is_autocast_available = lambda *a: True
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch.nn.Module.to = lambda self, *a, **k: self  # modules are made on the card; fake ones cannot be moved


# ---- what is watched


class Watch(TorchDispatchMode):
    "Counts copies from the card to the host, large tensors in float64, and the precisions of linear maps."

    def __init__(self):
        super().__init__()
        self.reads, self.doubles, self.products = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, inputs = function.overloadpacket.__name__, [x for x in args if isinstance(x, torch.Tensor)]
        outputs = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in inputs) and any(x.device.type == "cpu" for x in outputs):
            self.reads[place_in_library()] += 1
        if any(x.is_cuda and x.dtype == torch.float64 and x.numel() > 10_000 for x in outputs):
            self.doubles[place_in_library()] += 1
        if name in LINEAR_MAPS:
            where = "" if outputs[0].is_cuda else " on the CPU"
            self.products[str(outputs[0].dtype).removeprefix("torch.") + where] += 1
        return result

    def found(self) -> dict:
        "The counts, and an empty record again."
        found = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Counter)}
        for name in found:
            getattr(self, name).clear()
        return found


def place_in_library() -> str:
    "The innermost line of protmae that is running."
    frame = sys._getframe(2)
    while frame and "protmae/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"


def answer_reads(watch):
    "A value read on the host is counted and answered with ones, so that what comes after it can be looked at too."
    names = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__")
    real = {name: getattr(torch.Tensor, name) for name in names}

    def answering(name):
        def method(self, *args, **kwargs):
            if not isinstance(self, FakeTensor):
                with _disable_current_modes() if name == "numpy" else contextlib.nullcontext():
                    return real[name](self, *args, **kwargs)
            if self.is_cuda:
                watch.reads[place_in_library()] += 1
            with _disable_current_modes():
                ones = torch.from_numpy(np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch.")))
                return ones if name == "cpu" else real[name](ones, *args, **kwargs)

        return method

    if "tolist" in vars(FakeTensor):
        del FakeTensor.tolist
    for name in real:
        setattr(torch.Tensor, name, answering(name))


@contextlib.contextmanager
def card(watch):
    "New tensors are fake."
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield


def made_on_card(module, name):
    "What this function or class makes lies on the card: fake modules cannot be moved there."
    real = getattr(module, name)

    @functools.wraps(real, updated=())
    def make(*args, **kwargs):
        with torch.device("cuda"):
            return real(*args, **kwargs)

    setattr(module, name, make)


# ---- cases


class UniRepOnCard(UniRep):
    "Its matrices are moved before they become layers."

    def _linear(self, matrix):
        with torch.device("cuda"):
            return super()._linear(matrix.to("cuda"))


class Cases:
    "Whole steps of the library, small and synthetic."

    def __init__(self, folder):
        self.folder, self.watch = Path(folder), Watch()
        self.store = make_demo_store(self.folder / "demo.h5", n=60, dim=64)
        for patching in ("window", "adaptive"):
            PatchCache(self.store, patching)
        self.pairs = read_pairs(self.folder / "demo.pairs.tsv", self.store)
        self.split = make_split(self.pairs, "random", 0)
        for module, name in ((pretrain, "build"), (training, "make_classifier"), (training, "PPIClassifier")):
            made_on_card(module, name)
        answer_reads(self.watch)

    def pretraining(self, arch, **more) -> dict:
        "Every step of an epoch, and the validation."
        sizes = dict(v2=TINY_V2, v5=TINY_V5)[arch] | more.pop("sizes", {})
        interval = more.pop("loss_sync_interval", None)
        with card(self.watch):
            run = pretrain.PretrainTrainer(
                arch, self.store, self.new_folder(), sizes=sizes, epochs=2, batch_size=16, compiled=False, **more
            )
            run.loss_sync_interval = interval or run.loss_sync_interval
            return self.epoch_of(run)

    def choices_to_compile(self) -> dict:
        "Which pretraining runs compile their full batches by themselves."
        chosen = {}
        asked = dict(v5={}, v2={}, v5_accumulating=dict(grad_accum=2), v5_switched_off=dict(compiled="no"))
        for name, more in asked.items():
            arch, more = name[:2], dict(batch_size=16, epochs=2) | more
            with card(self.watch):
                sizes = dict(v2=TINY_V2, v5=TINY_V5)[arch]
                run = pretrain.PretrainTrainer(arch, self.store, self.new_folder(), sizes=sizes, **more)
                chosen[name] = run.compiled is not None
        return dict(doubles={}, chosen=chosen)

    def interactions(self, encoder, **more) -> dict:
        "The same for a classifier."
        mean, std = np.zeros(self.store.dim, "f4"), np.ones(self.store.dim, "f4")
        arch = dict(v5="v5", v2="v2").get(encoder[:2], "patches")
        meta = dict(arch=arch, mean=mean, std=std, sizes={})
        training.load_encoder = lambda *a: (self.encoder(encoder), meta)
        made_on_card(training, "load_encoder")
        training.file_sha256 = lambda path: "0" * 64
        checkpoint = None if encoder == "none" else f"{encoder}.safetensors"
        sizes = dict(embed_dim=64, n_heads=4, batch_size=192, epochs=2)  # four steps
        with card(self.watch):
            run = training.PPITrainer(
                checkpoint, self.store, self.pairs, self.split, self.new_folder(), **sizes, **more
            )
            return self.epoch_of(run)

    def embedding(self, embedder) -> dict:
        "Batches of proteins through a language model."
        sequences = [sequence[:200] for sequence in self.store.sequences[:6]]
        with card(self.watch):
            embedder = embedder()
            self.watch.found()
            rows = embedder.embed(sequences)
        assert [x.shape for x in rows] == [(len(s), embedder.dim) for s in sequences]
        return self.watch.found()

    def unirep(self):
        shapes = {f"mlstm.0.w{name}": (dim, 256) for name, dim in (("x", 10), ("h", 64))}
        shapes |= {f"mlstm.0.w{name}": (dim, 64) for name, dim in (("mx", 10), ("mh", 64))}
        shapes |= {name.replace(".w", ".g"): shape[1:] for name, shape in shapes.items()}
        shapes |= {"embedding": (26, 10), "mlstm.0.b": (256,)}
        return UniRepOnCard({name: np.ones(shape, "f4") for name, shape in shapes.items()})

    def esm(self):

        letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", "<mask>"]
        (self.folder / "vocab.txt").write_text("\n".join(letters))
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        config = EsmConfig(
            vocab_size=len(letters), mask_token_id=29, pad_token_id=1, position_embedding_type="rotary", **sizes
        )
        with torch.device("cuda"):
            model = EsmModel(config, add_pooling_layer=False)
        return LanguageModel("random", model=model, tokenizer=EsmTokenizer(self.folder / "vocab.txt"))

    def prediction(self) -> dict:
        "Tiles of pairs, proteins computed once."
        everyone = np.arange(len(self.store))
        places = np.stack([np.zeros_like(everyone), everyone], 1)
        about = dict(mean=np.zeros(self.store.dim, "f4"), std=np.ones(self.store.dim, "f4"))
        with card(self.watch):
            with torch.device("cuda"):
                encoder = self.encoder("v5")
            net = training.make_classifier(encoder, config_for(n_heads=4))
            scorer = Scorer(net, ProteinFeatures(net, about, [self.store], places, everyone), everyone)
            self.watch.found()
            assert scorer(everyone[:20], everyone, grid=True).shape == (20, len(everyone))
            assert scorer(everyone[:30], everyone[30:60], grid=False).shape == (30,)
        return dict(tiles=2) | self.watch.found()

    def encoder(self, name):
        if name == "none":
            return IdentityEncoder(self.store.dim)
        if name == "v2":
            return TransformerMAE(self.store.dim, **TINY_V2)
        sizes = {key: value for key, value in TINY_V5.items() if not key.startswith("decoder")}
        return MAEEncoder(self.store.dim, **sizes, patching=name.removeprefix("v5 ") if " " in name else "window")

    def new_folder(self):
        return self.folder / f"run{len(list(self.folder.iterdir()))}"

    def batches(self, loader) -> list:
        "DataLoader reads values, so the batches come from its dataset."
        inner = loader.batch_sampler
        for index in getattr(inner, "batch_sampler", inner):
            batch = loader.dataset.__getitems__(index)
            yield {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}

    def epoch_of(self, run) -> dict:
        "Steps, then the reading of their losses, then the validation: what each of them asks the card for."
        run.model.train()
        self.watch.found()
        steps = 0
        for batch in self.batches(run.train_dl):
            run.train_step(batch)
            steps += 1
        in_steps = self.watch.found()
        self.check_places(run)
        run.flush_pending_losses()
        late = self.watch.found()
        run.val_dl = list(self.batches(run.val_dl))
        self.watch.found()
        run.validation()
        validation = self.watch.found()
        return dict(
            steps=steps, **in_steps, losses=late["reads"], validation=validation["reads"], batches=len(run.val_dl)
        )

    def check_places(self, run):
        "Weights, their gradients and the optimiser's state lie on the card, in float32."
        tensors = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        tensors |= {f"state of weight {i}": v for i, s in enumerate(run.opt.state.values()) for v in s.values()}
        for name, tensor in tensors.items():
            assert tensor.device.type == "cuda" and tensor.dtype == torch.float32, (name, tensor.device, tensor.dtype)


def main(folder, *only):
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    pretend_cuda()
    cases = Cases(folder)
    everything = {
        "v5 random": lambda: cases.pretraining("v5"),
        "v5 block": lambda: cases.pretraining("v5", mask="block"),
        "v5 adaptive": lambda: cases.pretraining("v5", sizes=dict(patching="adaptive")),
        "v5 accumulation": lambda: cases.pretraining("v5", grad_accum=2),
        "losses read at once": lambda: cases.pretraining("v5", loss_sync_interval=1),  # what must not be
        "v2": lambda: cases.pretraining("v2"),
        "v2 plain loss": lambda: cases.pretraining("v2", compress_weight=0),
        "ppi none": lambda: cases.interactions("none"),
        "ppi v5 frozen": lambda: cases.interactions("v5"),
        "ppi v5 adaptive": lambda: cases.interactions("v5 adaptive"),
        "ppi v2 frozen": lambda: cases.interactions("v2"),
        "ppi focal": lambda: cases.interactions("v5", focal=2.0),
        "ppi v5 fine-tuned": lambda: cases.interactions("v5", finetune=True),
        "ppi v2 fine-tuned": lambda: cases.interactions("v2", finetune=True),
        "ppi v5 LoRA": lambda: cases.interactions("v5", finetune="lora", lora_rank=4),
        "ppi v2 LoRA": lambda: cases.interactions("v2", finetune="lora", lora_rank=4),
        "ppi contrastive": lambda: cases.interactions("v5", contrastive=1),
    }
    everything |= {
        "compiled by itself": cases.choices_to_compile,
        "prediction": cases.prediction,
        "embedding, UniRep": lambda: cases.embedding(cases.unirep),
        "embedding, ESM-2": lambda: cases.embedding(cases.esm),
    }
    for name, case in everything.items():
        if name not in (only or everything):
            continue
        try:
            found = case()
        except Exception as e:
            traceback.print_exc(limit=-8)
            found = dict(failed=f"{type(e).__name__}: {str(e)[:400]}")
        print(json.dumps(dict(case=name) | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
