"""Kill jobs, let them run out of disk space, interrupt a notebook, run for long; and compare what is left afterwards.

The jobs are those of `reliability_jobs`.
"""

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
from reliability_jobs import JOBS, SIZES, JobProcess
from safetensors import safe_open
from safetensors.torch import load_file

import protmae
from protmae.data.store import EmbeddingStore, verify
from protmae.training.pretrain import PretrainTrainer

KILLS_IN_A_ROW = 7  # then the job may finish
MEASURED = {  # fields of JSON files that differ from run to run
    "seconds",
    "val_seconds",
    "proteins_per_s",
    "residues_per_s",
    "pairs_per_s",
    "seconds_per_epoch",
    "time",
    "train_seconds",
    "provenance",
}
SOAKS = dict(v5=10_000, v2=2_000, stores=200, resumes=50)  # name -> steps, stores opened or resumes
BOUND_MB, BOUND_FILES = 4.0, 0.5  # growth after the warm-up that counts as flat


# ---- what a job leaves


def without_measured(value):
    if isinstance(value, dict):
        return {name: without_measured(item) for name, item in value.items() if name not in MEASURED}
    return [without_measured(item) for item in value] if isinstance(value, list) else value


def hdf5_digest(path):
    "Of all datasets and attributes but the provenance."
    parts = []
    with h5py.File(path) as file:
        for name in sorted(file):
            values = file[name][:]
            parts.append((name, repr(list(values)) if values.dtype.kind == "O" else values.tobytes()))
        for name, value in sorted(file.attrs.items()):
            if name != "provenance":
                parts.append((name, value if isinstance(value, str) else np.asarray(value).tobytes()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def comparable(path):
    "What of a file must be the same in each run."
    if path.suffix == ".h5":
        return hdf5_digest(path)
    if path.suffix == ".npz":
        arrays = np.load(path, allow_pickle=False)
        return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    if path.name == "log.jsonl":
        return [without_measured(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return without_measured(json.loads(path.read_text()))
    if path.suffix == ".safetensors":  # the description of a classifier tells when it was tested
        with safe_open(path, "np") as file:
            said = json.loads((file.metadata() or {}).get("protmae", "null"))
            tensors = {name: hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest() for name in file.keys()}
        return without_measured(said), tensors
    if path.suffix in (".pt", ".html"):
        return "has times in it"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(
    folder: Path,
) -> dict:  # name -> what is comparable
    "Every file below a folder."
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): comparable(path) for path in files}


def assert_same(
    found: dict,  # `contents`
    expected: dict,
):
    "Raise unless both hold the same files."
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"{name}: missing")
        elif name not in expected:
            problems.append(f"{name}: left over")
        elif found[name] != expected[name]:
            problems.append(f"{name}: another")
    assert not problems, "; ".join(problems)


def is_temporary(path, folder):
    return ".tmp" in str(path.relative_to(folder)) or "state.old" in path.parts


def check_intact(
    folder: Path,
) -> bool:  # whether a file was being written, or a store being filled
    "Raise if a file in the folder is not whole; temporary files may lie there."
    files = sorted(folder.rglob("*"))
    is_writing = any(is_temporary(path, folder) for path in files)
    for path in files:
        if not is_temporary(path, folder) and path.is_file():
            is_writing |= check_file(path)
    return is_writing


def check_file(path) -> bool:
    "Raise if the file is not whole; returns whether it is a store that is being filled."
    if path.suffix in (".part", ".lock", ".html", ".pt") or path.name.endswith(".part.json"):
        return False
    if path.suffix == ".h5" and "patches" not in path.name and "tokens" not in path.name:
        verify(path)
        return EmbeddingStore(path).pending > 0
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.name == "log.jsonl":
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == list(range(1, 1 + len(epochs))), path.read_text()
    else:
        comparable(path)
    return False


@dataclass(frozen=True)
class Reference:
    "A job that ran without an interruption."

    contents: dict
    operations: int  # on files
    seconds: float
    written: int  # bytes by which the folder grew
    largest: int  # bytes of the largest file that is new or has grown


def file_sizes(folder):
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def run_to_end(job, folder):
    outcome = JobProcess(job, folder).finish()
    assert outcome.kind == "done", outcome.said
    return outcome


@functools.cache
def reference_run(job, template: Path, work: Path) -> Reference:
    "Run a job once without an interruption."
    folder = work / f"{job}-whole"
    shutil.copytree(template, folder)
    process = JobProcess(job, folder)
    started = time.perf_counter()
    outcome = process.finish()
    seconds = time.perf_counter() - started
    assert outcome.kind == "done", outcome.said
    before, after = file_sizes(template), file_sizes(folder)
    grown = [size for name, size in after.items() if size > before.get(name, 0)]
    written = sum(after.values()) - sum(before.values())
    reference = Reference(contents(folder), process.operations.value, seconds, written, max(grown))
    shutil.rmtree(folder)
    return reference


# ---- kills


def run_and_kill(job, folder, rng, reference, signal_number):
    "Run a job and kill it, at a random moment or (no signal) before a random file operation; seconds until it ended."
    if signal_number is None:
        return JobProcess(job, folder, die_at=int(rng.integers(1, reference.operations + 1))).finish(), 0.0
    process = JobProcess(job, folder)
    if not process.inbox.poll(rng.uniform(0, reference.seconds)):
        process.send(signal_number)
    started = time.perf_counter()
    outcome = process.finish()
    return outcome, time.perf_counter() - started


def survive(
    job: str,  # of `JOBS`
    template: Path,  # folder it starts from
    work: Path,  # folder to work in
    kills: int,  # how many
    seed: int = 0,  # of the random numbers
    signals=(None, signal.SIGKILL),  # in turn; None: right before a file operation
) -> dict:  # counts, and the longest time until a signal was obeyed
    "Kill a job again and again until it finishes, and compare with a run without an interruption."
    reference = reference_run(job, template, work)
    rng = np.random.default_rng([seed, *job.encode()])
    folder = work / job
    counts = dict(kills=0, while_writing=0, finished=0, operations=reference.operations, seconds=reference.seconds)
    counts["slowest"] = 0.0
    while counts["kills"] < kills:
        shutil.copytree(template, folder)
        is_done = False
        for _ in range(min(KILLS_IN_A_ROW, kills - counts["kills"])):
            signal_number = signals[counts["kills"] % len(signals)]
            outcome, seconds = run_and_kill(job, folder, rng, reference, signal_number)
            is_done = outcome.kind == "done"
            if is_done:
                break
            assert outcome.kind in ("killed", "stopped"), outcome.said
            counts["kills"] += 1
            counts["slowest"] = max(counts["slowest"], seconds)
            counts["while_writing"] += check_intact(folder)
        if not is_done:
            run_to_end(job, folder)
        assert_same(contents(folder), reference.contents)
        counts["finished"] += 1
        shutil.rmtree(folder)
    return counts


# ---- a full disk


@contextlib.contextmanager
def small_disk(
    folder: Path,  # new
):
    "A tmpfs of its own; yields a function that sets the free bytes, or None where mounting is not allowed."
    folder.mkdir(parents=True)

    def mount(*options):
        return subprocess.run(["mount", *map(str, options)], capture_output=True, text=True).returncode == 0

    def set_free(size):
        disk = os.statvfs(folder)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        assert mount("-o", f"remount,size={used + int(size)}", folder)

    try:
        is_mounted = mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", folder)
    except OSError:
        is_mounted = False
    try:
        yield set_free if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def squeeze(
    job: str,  # of `JOBS`
    template: Path,  # folder it starts from
    work: Path,  # folder to work in
    shares,  # of what the job writes: how much there is room for
    disk: bool = True,  # a tmpfs; False: a limit on the size of a file, which fails in the same places
) -> dict:  # counts, and examples of what was said
    "Let a job run out of space, check what is there, make space, run it again and compare."
    reference = reference_run(job, template, work)
    counts = dict(refused=0, enough=0, said=[])
    for share in shares:
        with small_disk(work / "small") if disk else contextlib.nullcontext() as set_free:
            if disk and set_free is None:
                return dict(skipped="no tmpfs may be mounted here")
            folder = work / "small" / job
            shutil.copytree(template, folder)
            if disk:
                set_free(share * reference.written)
            limit = 0 if disk else max(int(share * reference.largest), 1)
            outcome = JobProcess(job, folder, size_limit=limit).finish()
            assert outcome.kind in ("refused", "done"), f"{job} with {share:.0%} of the space: {outcome.said}"
            if outcome.kind == "done":
                counts["enough"] += 1
            else:
                counts["refused"] += 1
                message = outcome.said.replace(str(folder), "").splitlines()[0][:160]
                counts["said"] = sorted({*counts["said"], message})[:4]
            check_intact(folder)
            if disk:
                set_free(1 << 28)
            run_to_end(job, folder)
            assert_same(contents(folder), reference.contents)
            shutil.rmtree(folder)
    return counts


# ---- Ctrl-C in a notebook

NOTEBOOK = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from protmae.training.pretrain import pretrain
pretrain("v5", "demo.h5", "run", sizes={sizes!r}, cpu=True, batch_size=8, epochs=1000, lr=3e-3)
"""


def interrupt_kernel(
    folder: Path,  # with demo.h5, to train in
) -> str:  # what the interrupted cell printed and raised
    "Train in a Jupyter kernel and interrupt it after the first epoch, as the stop button does."
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        root = str(Path(protmae.__file__).parents[1])
        client.execute(NOTEBOOK.format(root=root, sizes=SIZES["v5"]))
        said, is_interrupted = "", False
        while True:
            message = client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                said += content["text"]
            elif kind == "error":
                said += content["ename"]
            if "epoch 1/" in said and not is_interrupted:
                is_interrupted = True
                manager.interrupt_kernel()
            if kind == "status" and content["execution_state"] == "idle" and said:
                return said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# ---- long runs


def memory_and_files():
    "Resident bytes of this process after garbage collection, and how many files it has open."
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds()


def soak_training(arch, steps):
    "Train for so many steps."
    samples = []

    class SampledTrainer(PretrainTrainer):
        def loss(self, batch):
            step = self.epoch * len(self.train_dl) + self.step
            if step % max(1, steps // 200) == 0:
                samples.append((step, *memory_and_files()))
            if step >= steps:
                raise KeyboardInterrupt
            return super().loss(batch)

    run = SampledTrainer(arch, "demo.h5", "soak", sizes=SIZES[arch], cpu=True, batch_size=1, epochs=10**6)
    with contextlib.suppress(KeyboardInterrupt):
        run.fit()
    return dict(unit="steps", samples=samples)


def soak_stores(count):
    "Open and close a store so many times."
    samples = []
    for i in range(count):
        with EmbeddingStore("demo.h5") as store:
            store[i % len(store)]
            store.mean_std()
        if i % 2 == 0 or i == count - 1:
            samples.append((i, *memory_and_files()))
    return dict(unit="stores opened and closed", samples=samples)


class InterruptedTrainer(PretrainTrainer):
    "Ctrl-C after each epoch."

    def finish_epoch(self):
        super().finish_epoch()
        signal.raise_signal(signal.SIGINT)


def soak_resumes(count):
    "Interrupt a run and take it up so many times."
    samples = []
    for i in range(count):
        settings = dict(cpu=True, batch_size=8, epochs=count + 1)
        with contextlib.suppress(KeyboardInterrupt):
            InterruptedTrainer("v5", "demo.h5", "soak", sizes=SIZES["v5"], **settings).fit()
        samples.append((i, *memory_and_files()))
    assert len(Path("soak/log.jsonl").read_text().splitlines()) == count
    return dict(unit="resumes", samples=samples)


JOBS["soak-v5"] = functools.partial(soak_training, "v5", SOAKS["v5"])
JOBS["soak-v2"] = functools.partial(soak_training, "v2", SOAKS["v2"])
JOBS["soak-stores"] = functools.partial(soak_stores, SOAKS["stores"])
JOBS["soak-resumes"] = functools.partial(soak_resumes, SOAKS["resumes"])


def soak(
    name: str,  # of `SOAKS`
    folder: Path,  # with demo.h5
) -> dict:  # samples, growth after the warm-up (the first quarter), bounds
    "Run one soak in a process of its own; growth is the slope of a line through the samples after the warm-up."
    result = run_to_end(f"soak-{name}", folder).result
    place, memory, files = np.array(result["samples"], float).T
    megabytes = memory / 1e6
    is_warm = place >= place[len(place) // 4]
    span = place[-1] - place[is_warm][0]

    def slope(values):
        return float(np.polyfit(place[is_warm], values[is_warm], 1)[0])

    return dict(
        unit=result["unit"],
        n=int(place[-1]) + 1,
        mb_per_1000=slope(megabytes) * 1000,
        growth_mb=float(slope(megabytes) * span),
        growth_files=round(float(slope(files) * span), 6),
        bound_mb=BOUND_MB,
        bound_files=BOUND_FILES,
        samples=[[int(x), round(size, 2), int(n)] for x, size, n in zip(place, megabytes, files, strict=True)],
    )
