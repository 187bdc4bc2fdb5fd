"""Small jobs that run in processes of their own, so that they can be killed or run out of disk space.

Each job works in the current folder and is what a user would run again after an interruption. Models and data are
small and synthetic. `13_reliability.ipynb` and `nbs/bench/reliability.py` use this module and `reliability_attacks`.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import numpy as np
import torch

from protmae import cli
from protmae.core import ProtmaeError
from protmae.data.datasets import Dataset, Source, fetch
from protmae.data.store import EmbeddingStore
from protmae.data.synthetic import make_demo_store
from protmae.embed.run import embed_fasta
from protmae.models.classifier import PPIClassifier
from protmae.models.hub import build, save_model
from protmae.ppi.features import TokenCache
from protmae.ppi.pairs import read_pairs
from protmae.ppi.results import evaluate_test_split
from protmae.ppi.splits import make_split
from protmae.ppi.training import PPITrainer, load_encoder
from protmae.training.pretrain import pretrain
from protmae.utils.interrupt import handle_stops

SIZES = dict(
    v2=dict(embed_dim=32, num_layers=1, nhead=2, ff_dim=32),
    v5=dict(embed_dim=32, num_layers=1, nhead=2, ff_dim=64, decoder_dim=16, decoder_layers=1, decoder_heads=2),
)
SAVE_MINUTES = 5e-4  # a checkpoint every 30 ms, so that many kills find one being written
JOBS = {}  # name -> function without arguments, filled by `job`
TEMPLATES = dict(  # job -> the files that `prepare` puts into its folder
    v2=["demo.h5"],
    v5=["demo.h5"],
    ppi=["demo.h5", "demo.pairs.tsv", "v5.safetensors"],
    embed=["many.fasta"],
    append=["more.fasta", "old.h5"],
    patches=["demo.h5"],
    tokens=["demo.h5", "v5.safetensors"],
    fetch=["url"],
    report=["run.ipynb"],
    predict=["demo.h5", "ppi.safetensors"],
)


def job(name, *arguments):
    "Register a function as the job `name`, called with `arguments`."

    def register(function):
        JOBS[name] = functools.partial(function, *arguments)
        return function

    return register


# ---- the jobs


class ToyLanguageModel:
    "A batch takes some milliseconds, and the result depends on the batch, as it does for real models in the last bits."

    name, layer, dim, max_tokens = "toy", "none", 24, 256

    def embed(self, sequences):
        time.sleep(0.005)
        base = len(sequences) + 0.01 * len(sequences[0])
        letters = [np.frombuffer(sequence.encode(), "u1")[:, None] / 64 for sequence in sequences]
        return [np.full((len(column), self.dim), base, "f4") + column for column in letters]


@job("v2", "v2", 4)
@job("v5", "v5", 6)
def train(arch, epochs):
    settings = dict(batch_size=8, epochs=epochs, lr=3e-3, save_minutes=SAVE_MINUTES)
    pretrain(arch, "demo.h5", "run", sizes=SIZES[arch], cpu=True, **settings)


@job("ppi")
def train_pairs():
    store = EmbeddingStore("demo.h5")
    pairs = read_pairs("demo.pairs.tsv", store)
    settings = dict(epochs=3, patience=None, batch_size=16, embed_dim=32, n_heads=2, n_layers=1)
    split = make_split(pairs, "random")
    run = PPITrainer("v5.safetensors", store, pairs, split, "run", cpu=True, save_minutes=SAVE_MINUTES, **settings)
    run.fit()
    evaluate_test_split(run, 20)


@job("embed", "many.fasta", "many.h5")
@job("append", "more.fasta", "old.h5")
def embed(fasta, store):
    embed_fasta(fasta, store, ToyLanguageModel())


@job("tokens")
def cache_tokens():
    store = EmbeddingStore("demo.h5")
    encoder, meta = load_encoder("v5.safetensors", store, [0])
    model = PPIClassifier(encoder, embed_dim=32, n_heads=1, n_layers=1)
    TokenCache(model, store, meta["mean"], meta["std"], max_tokens=512)


@job("fetch")
def download():
    url = Path("url").read_text()
    sources = Source("p.tsv", f"{url}/p.tsv", "pairs"), Source("s.fasta", f"{url}/s.fasta", "proteins")
    fetch("toy", ".", dict(toy=Dataset(sources, "CC0", "nobody", "nowhere")))


JOBS["patches"] = functools.partial(cli.patches, "demo.h5")
JOBS["report"] = functools.partial(cli.report, "run.ipynb", "page.html")
JOBS["predict"] = functools.partial(cli.predict, "ppi.safetensors", store="demo.h5", all=True, out="all.tsv")


# ---- what they start from


class SlowServer(BaseHTTPRequestHandler):
    "Sends two files in small pieces; continues a download where the client asks it to."

    files = {
        "/p.tsv": b"".join(b"p%d\tp%d\t%d\n" % (i, i + 1, i % 2) for i in range(20_000)),
        "/s.fasta": b"".join(b">p%d\n%s\n" % (i, b"MKV" * 30) for i in range(2000)),
    }
    piece = 1 << 15  # bytes

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        body, tag = self.files[self.path], f'"{self.path}"'
        start = int(self.headers["Range"][6:-1]) if self.headers.get("If-Range") == tag else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", len(body) - start)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client was killed
            for i in range(start, len(body), self.piece):
                self.wfile.write(body[i : i + self.piece])
                self.wfile.flush()
                time.sleep(0.01)


def write_fasta(path, names):
    "Random sequences, the same ones for the same names (numbers)."
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    sequences = ["".join(np.random.default_rng(i).choice(letters, 20 + i)) for i in names]
    path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in zip(names, sequences, strict=True)))


def write_notebook(path):
    "A notebook that was run: prose, a printed text and a figure."
    figure = dict(data=[dict(type="scatter", y=[1, 2, 3])], layout={})
    outputs = [
        nbformat.v4.new_output("stream", text="three points\n"),
        nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": figure}),
    ]
    cells = [nbformat.v4.new_markdown_cell("# Report"), nbformat.v4.new_code_cell("plot()", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def prepare(
    folder: Path,  # new
) -> dict:  # job -> folder to copy before it runs
    "What each job starts from."
    store = make_demo_store(folder / "demo.h5", n=48, dim=24)
    torch.manual_seed(0)
    sizes = dict(input_dim=24) | SIZES["v5"]
    save_model(folder / "v5.safetensors", build("v5", **sizes), "v5", sizes, *store.mean_std())
    write_fasta(folder / "many.fasta", range(40))
    write_fasta(folder / "more.fasta", range(30, 70))
    write_notebook(folder / "run.ipynb")
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "url").write_text(f"http://127.0.0.1:{server.server_port}")
    with contextlib.redirect_stdout(io.StringIO()):
        embed_fasta(folder / "many.fasta", folder / "old.h5", ToyLanguageModel())
    for name, files in TEMPLATES.items():
        template = folder / "from" / name
        template.mkdir(parents=True)
        for file in files:
            shutil.copy(folder / file, template / file)
        if name == "ppi":
            run = JobProcess(name, shutil.copytree(template, folder / "trained"))
            assert run.finish().kind == "done"
            shutil.copy(folder / "trained" / "run" / "best.safetensors", folder / "ppi.safetensors")
    return {name: folder / "from" / name for name in TEMPLATES}


# ---- a job in a process of its own


@dataclass(frozen=True)
class Outcome:
    "How a job ended."

    kind: str  # done, refused (by a `ProtmaeError`), stopped (by a signal), broken (by another error) or killed
    said: str = ""  # what it printed, or the message
    result: object = None  # what its function returned


class JobProcess:
    "A job in a process of its own; it begins to work when the constructor returns."

    def __init__(
        self,
        name: str,  # of `JOBS`
        folder,  # where it works
        die_at: int = 0,  # file operation before which it kills itself; 0: none
        size_limit: int = 0,  # bytes that a file may have; 0: any number
    ):
        context = fork_server()
        self.inbox, outbox = context.Pipe(False)
        self.operations = context.Value("i", 0)  # file operations so far
        arguments = name, str(folder), self.operations, die_at, size_limit, outbox
        self.process = context.Process(target=run_job, args=arguments, daemon=True)
        self.process.start()
        outbox.close()
        self.inbox.recv()

    def pause(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def send(self, signal_number):
        os.kill(self.process.pid, signal_number)

    def finish(self) -> Outcome:
        "Wait for its end."
        try:
            outcome = self.inbox.recv()
        except EOFError:
            outcome = Outcome("killed")
        self.process.join()
        self.process.close()
        return outcome


@functools.cache
def fork_server():
    "Processes are forked from one that has imported everything, so that they start at once."
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["reliability_attacks", "torch._dynamo", "sklearn.metrics", "nbconvert", "bleach", "bs4"]
    )
    return context


def run_job(name, folder, operations, die_at, size_limit, outbox):
    "What runs in the new process; sends an `Outcome`."
    os.chdir(folder)
    torch.set_num_threads(1)
    if size_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
    outbox.send("ready")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        try:
            count_operations(operations, die_at)
            with handle_stops(signal.default_int_handler):  # as the command line does
                result = JOBS[name]()
            outcome = Outcome("done", screen.getvalue(), result)
        except KeyboardInterrupt:
            outcome = Outcome("stopped", screen.getvalue())
        except ProtmaeError as e:
            outcome = Outcome("refused", str(e))
        except BaseException:
            outcome = Outcome("broken", screen.getvalue() + traceback.format_exc())
    outbox.send(outcome)


def count_operations(operations, die_at):
    "Count the file operations below the current folder; kill this process right before operation `die_at`."
    here = os.getcwd()

    def tick():
        operations.value += 1
        if operations.value == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_file_operation(event, arguments):
        if event == "open":
            return isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")

    def hook(event, arguments):
        if is_file_operation(event, arguments) and os.path.abspath(os.fsdecode(arguments[0])).startswith(here):
            tick()

    def counted(function):
        def call(*arguments):
            tick()
            return function(*arguments)

        return call

    sys.addaudithook(hook)
    os.fsync, os.pwrite = counted(os.fsync), counted(os.pwrite)
