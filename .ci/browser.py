"""A real browser on real pages.

python .ci/browser.py CHECKOUT [WORD ...]    notebooks are run there, so .ci/test.py gives it a copy;
                                             with words: only tests whose names hold them all

JupyterLab runs 01_explore_masking, where a slider is moved, and 06_umap, where points are chosen. Pages made from
notebooks open with the network cut, on a wide screen and on a phone. Prints a line per test; exit status 1 if one
failed, 75 if there is no browser to test with. BROWSER_SHOTS=FOLDER keeps screenshots.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
SHOTS = os.environ.get("BROWSER_SHOTS")
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = os.environ | dict(PYTHONPATH=PATHS, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (["apt-get", "update", "-q"], ["apt-get", "install", "-yq", "--no-install-recommends", "chromium"])
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
]


def skip(why):
    print(f"SKIPPED the browser tests: {why}")
    sys.exit(75)


try:
    from playwright.sync_api import sync_playwright
except ImportError:
    skip("the Python package playwright is missing (pip install playwright)")


def installed_browser():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def find_browser():
    "Path of a Chromium; with BROWSER_INSTALL=1 it is installed where that is possible."
    found = installed_browser()
    if found:
        return found
    if os.environ.get("BROWSER_INSTALL") != "1":
        skip(f"no {' or '.join(NAMES[:3])} on this machine (Debian: apt-get install chromium)")
    if os.geteuid() or not shutil.which("apt-get"):
        skip("no Chromium on this machine, and it takes root and apt-get to install one")
    for command in INSTALL:
        quiet = os.environ | dict(DEBIAN_FRONTEND="noninteractive")
        ran = subprocess.run(command, capture_output=True, text=True, env=quiet)
        if ran.returncode:
            skip(f"{' '.join(command)} failed: {(ran.stderr or ran.stdout).strip().splitlines()[-1:]}")
    return installed_browser() or skip("apt-get installed chromium, but none is found")


def until(what, test, seconds=60):
    "Wait for `test()` to be true."
    end = time.monotonic() + seconds
    while not (value := test()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.2)
    return value


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


# ---- what is drawn

DRAWN = """() => [...document.querySelectorAll('.js-plotly-plot')].map(g => {
  const box = g.getBoundingClientRect(), svg = g.querySelector('.main-svg')?.getBoundingClientRect();
  const ink = c => {
    if (!c.width || !c.height) return 0;
    const d = document.createElement('canvas');
    d.width = c.width; d.height = c.height;
    const x = d.getContext('2d');
    x.drawImage(c, 0, 0);
    return x.getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length;
  };
  return {
    width: box.width, height: box.height,
    svg: !!svg && svg.width > 100 && svg.height > 100,
    gl: g.data.some(t => t.type == 'scattergl'),
    marks: g.querySelectorAll('.heatmaplayer image, .scatterlayer path, .barlayer path, .histogram path').length,
    ink: [...g.querySelectorAll('canvas')].reduce((s, c) => s + ink(c), 0),
  };
})"""


def check_drawn(page, where):
    "Every plot has a size and something in it; returns how many there are."
    figures = page.evaluate(DRAWN)
    assert figures, f"{where}: no plot"
    for k, figure in enumerate(figures, 1):
        large = figure["svg"] and figure["width"] > 100 and figure["height"] > 100
        filled = figure["ink"] > 50 if figure["gl"] else figure["marks"] > 0
        assert large and filled, f"{where}: plot {k} is not drawn: {figure}"
    return len(figures)


# ---- JupyterLab


def write_setting(folder, extension, name, text):
    (folder / "@jupyterlab" / extension).mkdir(parents=True, exist_ok=True)
    (folder / "@jupyterlab" / extension / f"{name}.jupyterlab-settings").write_text(text)


def start_lab(folder):
    "JupyterLab on 127.0.0.1, with settings of its own; returns the process, its address and its token."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = folder / "settings"
    write_setting(settings, "notebook-extension", "tracker", '{"windowingMode": "none"}')  # every cell in the page
    write_setting(settings, "apputils-extension", "notification", '{"fetchNews": "false"}')
    write_setting(settings, "docmanager-extension", "plugin", '{"autosave": false}')  # the checkout stays clean
    token = secrets.token_hex(16)
    env = ENV | dict(JUPYTER_TOKEN=token, JUPYTERLAB_SETTINGS_DIR=str(settings))
    for name, place in dict(
        JUPYTERLAB_WORKSPACES_DIR="ws", JUPYTER_CONFIG_DIR="config", JUPYTER_RUNTIME_DIR="run"
    ).items():
        env[name] = str(folder / place)
    env.pop("IN_TEST", None)
    log = open(folder / "lab.log", "w")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={NBS}"]
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def up():
        if process.poll() is not None:
            raise AssertionError(f"JupyterLab ended: {(folder / 'lab.log').read_text()[-2000:]}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until("JupyterLab", up)
    return process, f"http://127.0.0.1:{port}", token


def run_all_cells(page):
    "Ask for it; asked too early, JupyterLab does nothing, or asks which kernel."
    question = page.locator(".jp-Dialog .jp-mod-accept")
    if question.count():
        question.first.click()
        time.sleep(2)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    time.sleep(5)
    prompts = page.locator(".jp-InputPrompt").all_inner_texts()
    return any(prompt.strip() not in ("", "[ ]:") for prompt in prompts)


def errors_in(page):
    "Texts of errors in a notebook's outputs."
    bad = ("Error displaying widget", "Error creating widget", "not JSON compliant", "Traceback")
    outputs = page.locator(".jp-OutputArea-output").all_inner_texts()
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    return errors + [text for text in outputs if any(word in text for word in bad)]


@contextmanager
def notebook(browser, folder, name, ready):
    "A notebook in JupyterLab, all of it run; yields its page once `ready(page)` is true."
    folder = folder / name
    folder.mkdir()
    server, url, token = start_lab(folder)
    page = browser.new_page(viewport=dict(width=1400, height=1500))

    def done():
        errors = errors_in(page)
        assert not errors, f"error in the notebook: {errors[0][-1500:]}"
        return ready(page)

    try:
        page.goto(f"{url}/lab/tree/{name}.ipynb?reset&token={token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        until("the kernel", lambda: "| Idle" in page.locator("#jp-main-statusbar").inner_text(), 120)
        time.sleep(2)
        until("the first cell", lambda: run_all_cells(page), 120)
        until(f"{name} to run", done, 600)
        yield page
        assert not errors_in(page), errors_in(page)[0][-1500:]
    except Exception:
        shot(page, f"{name}_failed")
        raise
    finally:
        page.close()
        server.terminate()
        server.wait(30)


def explore_in_lab(browser, folder):
    "01_explore_masking in JupyterLab: run all, no error, move the slider, the figure changes."

    def ready(page):
        slider = page.locator(".widget-slider .noUi-handle").count()
        return slider and page.locator(".jupyter-widgets .js-plotly-plot .gtitle").count()

    with notebook(browser, folder, "01_explore_masking", ready) as page:
        count = check_drawn(page, "01_explore_masking")
        printed = "\n".join(page.locator(".jp-OutputArea-output").all_inner_texts())
        names = re.search(r"residues; models: (.+)", printed)
        models = len(names.group(1).split(", "))
        expected = 2 * models + 1
        assert count == expected, f"{count} figures; expected 2 for each of {models} models and a movable one"
        figure = page.locator(".jupyter-widgets .js-plotly-plot").last
        figure.scroll_into_view_if_needed()

        def state():
            images = "xs => xs.map(x => x.getAttribute('href') || x.getAttribute('xlink:href')).join()"
            title = figure.locator(".gtitle").text_content()
            return title, figure.locator(".heatmaplayer image").evaluate_all(images)

        before = state()
        shot(page, "explore_before")
        page.locator(".widget-slider .noUi-handle").first.focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        until("the figure to change", lambda: state()[0] != before[0] and state()[1] != before[1])
        time.sleep(1)
        shot(page, "explore_after")
        check_drawn(page, "01_explore_masking, slider moved")


SELECTED = "g => g.data.map(t => t.selectedpoints ? [...t.selectedpoints].sort((a, b) => a - b).join() : null)"


def umap_in_lab(browser, folder):
    "06_umap in JupyterLab: what is chosen in one map is chosen in all."

    def ready(page):
        last = page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text().strip()
        return last not in ("", "[ ]:", "[*]:") and page.locator(".jupyter-widgets .js-plotly-plot .nsewdrag").count()

    with notebook(browser, folder, "06_umap", ready) as page:
        figure = page.locator(".jupyter-widgets .js-plotly-plot").last
        figure.scroll_into_view_if_needed()
        time.sleep(1)
        check_drawn(page, "06_umap")

        def the_same_in_all():
            chosen = {points for points in figure.evaluate(SELECTED) if points is not None}
            return len(chosen) == 1 and chosen != {""}

        def choose():
            "Draw around most points of the first map; tried again, since the lasso may come before the widget listens."
            box = figure.locator(".nsewdrag").first.bounding_box()
            corners = [(0.1, 0.1), (0.6, 0.1), (0.6, 0.9), (0.1, 0.9), (0.1, 0.1)]
            spots = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in corners]
            page.mouse.move(*spots[0])
            page.mouse.down()
            for x, y in spots[1:]:
                page.mouse.move(x, y, steps=20)
            page.mouse.up()
            try:
                until("the points chosen in one map to be chosen in all", the_same_in_all, 30)
                return True
            except AssertionError:
                return False

        until("the points chosen in one map to be chosen in all", choose, 90)
        shot(page, "umap_chosen")


# ---- pages without a network


def open_offline(browser, path):
    "Open a page with the network cut; every plot is drawn, nothing fails, nothing was asked of the network."
    context = browser.new_context(viewport=dict(width=1300, height=900))
    context.set_offline(True)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda e: wrong.append(f"error: {e}"))

    def asked(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(f"asked for {request.url[:100]}")

    page.on("request", asked)
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    time.sleep(2.5)
    check_drawn(page, path.name)
    shot(page, path.stem)
    assert not wrong, f"{path.name}: {wrong[:3]}"
    return page


def check_page(browser, path):
    "The same on a phone: nothing is wider than the screen, and every entry of the contents leads somewhere."
    page = open_offline(browser, path)
    links = page.locator("nav a").evaluate_all("xs => xs.map(x => x.getAttribute('href'))")
    targets = "href => document.getElementById(decodeURIComponent(href.slice(1))) !== null"
    lost = [href for href in links if href.startswith("#") and not page.evaluate(targets, href)]
    assert links and not lost, f"{path.name}: contents {links}, of which {lost} lead nowhere"
    assert path.stat().st_size < 5e6, f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; expected under 5"
    page.set_viewport_size(dict(width=390, height=844))
    page.reload()
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    time.sleep(2.5)
    check_drawn(page, f"{path.name}, 390 pixels wide")
    shot(page, f"{path.stem}_phone")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, f"{path.name}: {width} pixels wide on a screen of 390"
    page.context.close()


def page_of(name):
    "Run a notebook by papermill and turn it into a page."
    out, made = ROOT / "data" / f"{name}.out.ipynb", ROOT / "data" / f"{name}.html"
    for command in (
        ["papermill", f"{name}.ipynb", str(out), "--cwd", "."],
        ["protmae.cli", "report", str(out), str(made)],
    ):
        ran = subprocess.run([sys.executable, "-m", *command], cwd=NBS, capture_output=True, text=True, env=ENV)
        assert not ran.returncode, f"{' '.join(command)} failed: {ran.stderr[-2000:]}"
    return made


def all_tests(browser, folder):
    "Name -> what to call."
    tests = {
        "JupyterLab: 01_explore_masking, slider": lambda: explore_in_lab(browser, folder),
        "JupyterLab: 06_umap, linked selection": lambda: umap_in_lab(browser, folder),
        "05_compare by papermill, its page": lambda: check_page(browser, page_of("05_compare")),
        "08_study by papermill, its page": lambda: check_page(browser, page_of("08_study")),
    }
    for path in sorted((ROOT / "reports").rglob("*.html")):
        tests[f"{path.relative_to(ROOT)} offline"] = lambda path=path: check_page(browser, path)
    return {name: test for name, test in tests.items() if all(word in name for word in sys.argv[2:])}


def main():
    path = find_browser()
    results = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except Exception as e:
            skip(f"{path} does not start: {str(e).strip().splitlines()[0]}")
        print(f"{path} {browser.version}", flush=True)
        for name, test in all_tests(browser, Path(folder)).items():
            started = time.perf_counter()
            try:
                test()
                results.append(True)
                print(f"passed  {name}  ({time.perf_counter() - started:.0f} s)", flush=True)
            except Exception as e:
                results.append(False)
                print(f"FAILED  {name}\n{type(e).__name__}: {e}", flush=True)
        browser.close()
    print(f"browser: {sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
