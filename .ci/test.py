"""Run nbdev_test over every notebook, in a fresh copy of this checkout, then the browser tests there; end with a line that counts: one notebook is one test.

--browser runs the browser tests alone."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
env = dict(
    os.environ,
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    PYTHONUNBUFFERED="1",
    PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
)
with tempfile.TemporaryDirectory() as tmp:
    # a copy: no earlier run's store or checkpoint can make a test pass, and none of yours is touched
    copy = Path(tmp) / root.name
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
    ).stdout.splitlines()
    for f in files or [
        str(p.relative_to(root))
        for p in root.rglob("*")
        if p.is_file() and not set(p.parts) & {".venv", ".git", "runs"} and p.suffix != ".h5"
    ]:
        if (root / f).is_file():
            (copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / f, copy / f)
    if (root.parent / "shared").exists():
        (Path(tmp) / "shared").symlink_to((root.parent / "shared").resolve())

    def stream(cmd, **more):
        "Run a command, show what it says, return its status and its lines."
        p, lines = (
            subprocess.Popen(
                cmd, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env | more
            ),
            [],
        )
        for line in p.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line.rstrip())
        return p.wait(), lines

    alone = "--browser" in sys.argv[1:]
    code, lines = (
        (0, [])
        if alone
        else stream(["nbdev_test", "--do_print", "--timing", "--n_workers", str(max(2, min(os.cpu_count() or 2, 4)))])
    )
    web, said = stream(
        [sys.executable, ".ci/browser.py", "."],
        PYTHONPATH=os.pathsep.join([str(copy), *filter(None, [env.get("PYTHONPATH")])]),
    )
ran = sum(l.startswith("Starting ") for l in lines)
after = [i for i, l in enumerate(lines) if "nbdev Tests Failed On The Following Notebooks" in l]
failed = sum(bool(re.fullmatch(r"\s+\S+\.ipynb", l)) for l in lines[after[-1] :]) if after else 0
if (code or not ran) and not failed and not alone:
    failed = 1  # nbdev_test itself broke down
found = re.fullmatch(r"browser: (\d+) passed, (\d+) failed", said[-1]) if said else None
good, bad = map(int, found.groups()) if found else (0, 0 if web == 75 else 1)  # 75: no browser here, and it said why
passed, failed = max(ran - failed, 0) + good, failed + bad
if web == 75:
    print("1 skipped:", said[-1].removeprefix("SKIPPED ") if said else "the browser tests")
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed else 0)
