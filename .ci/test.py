"""Run the tests in a fresh copy of this checkout; end with a line that counts. One notebook is one test.

python .ci/test.py             every notebook, the slowest first, then the browser tests
python .ci/test.py --check     what one wants every few minutes: lint, gates, export, the notebooks changed since main
python .ci/test.py --browser   the browser tests alone
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NO_BROWSER = 75  # exit status of browser.py where there is no browser
# These take longest; started first, they do not keep one core busy alone at the end.
SLOWEST = [
    "13_reliability",
    "05_distributed",
    "15_card",
    "04_train_ppi",
    "05_compare",
    "06_study",
    "06_umap",
    "01_explore",
]


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()


def copy_checkout(target):
    "Copy what git knows or would add: no earlier run's store or checkpoint can make a test pass, and none is touched."
    for name in git("ls-files", "-co", "--exclude-standard"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    shared = ROOT.parent / "shared"  # real data for some tests, where they are at hand
    if shared.exists():
        (target.parent / "shared").symlink_to(shared.resolve())


def slow_first(path):
    rank = next((i for i, name in enumerate(SLOWEST) if path.stem.startswith(name)), len(SLOWEST))
    return rank, -path.stat().st_size


def run_notebooks(paths, root):
    "Run notebooks side by side; returns the names of those that failed."
    from nbdev.test import test_nb

    workers = max(2, min(os.cpu_count() or 2, 4))
    failed = []
    with ProcessPoolExecutor(workers) as pool:
        ordered = sorted(paths, key=slow_first)
        jobs = {pool.submit(test_nb, path, skip_flags=["slow"], basepath=root): path for path in ordered}
        for job in as_completed(jobs):
            name = jobs[job].relative_to(root)
            passed, seconds = job.result()
            print(f"{'ok' if passed else 'FAILED':6} {seconds:5.0f} s  {name}", flush=True)
            if not passed:
                failed.append(str(name))
    return failed


def run_browser(root):
    "The browser tests; returns how many passed and failed."
    command = [sys.executable, ".ci/browser.py", "."]
    ran = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    print(ran.stdout, end="")
    lines = ran.stdout.splitlines() or [""]
    counted = re.fullmatch(r"browser: (\d+) passed, (\d+) failed", lines[-1])
    if counted:
        return int(counted[1]), int(counted[2])
    if ran.returncode == NO_BROWSER:
        print("1 skipped: " + lines[-1].removeprefix("SKIPPED "))
        return 0, 0
    return 0, 1


def run_steps(steps):
    "Run commands in the checkout; returns how many passed and failed."
    results = []
    for command in steps:
        started = time.perf_counter()
        ran = subprocess.run(command, cwd=ROOT)
        results.append(ran.returncode == 0)
        print(f"{'ok' if results[-1] else 'FAILED':6} {time.perf_counter() - started:5.0f} s  {' '.join(command)}")
    return sum(results), len(results) - sum(results)


def changed_notebooks():
    "Notebooks of nbs/ that differ from main, or are not committed."
    base = git("merge-base", "main", "HEAD")
    names = set(git("diff", "--name-only", *base)) | set(git("ls-files", "-o", "--exclude-standard"))
    return [name for name in names if name.startswith("nbs/") and name.endswith(".ipynb") and (ROOT / name).exists()]


LINT = [
    ["ruff", "format", "--check", "--quiet", "."],
    ["ruff", "check", "--quiet", "--output-format", "concise", "."],
    [sys.executable, ".ci/gates.py"],
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--browser", action="store_true")
    options = parser.parse_args()
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests compare numbers of the CPU; nbs/bench/gpu.py is for a GPU
    passed, failed = 0, 0
    if not options.browser:
        passed, failed = run_steps(LINT + ([["nbdev_export"]] if options.check else []))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        copy_checkout(copy)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
        if not options.browser:
            every = [p for p in (copy / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
            paths = [copy / name for name in changed_notebooks()] if options.check else every
            broken = run_notebooks(paths, copy)
            passed, failed = passed + len(paths) - len(broken), failed + len(broken)
            print(*[f"failed: {name}" for name in broken], sep="\n")
        if not options.check:
            good, bad = run_browser(copy)
            passed, failed = passed + good, failed + bad
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
