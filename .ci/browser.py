"""A real browser on real pages: JupyterLab runs 01_explore_masking and its slider is moved, and 06_umap, where points are chosen; HTML pages open with the network cut.

python .ci/browser.py CHECKOUT [WORD ...]    (it runs notebooks there, so .ci/test.py gives it a copy; with words: only tests whose names hold them all)
Prints a line per test; exit status 1 if one failed, 75 if there is no browser to test with."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
nbs = root / "nbs"
bin, keep = Path(sys.executable).parent, os.environ.get("BROWSER_SHOTS")  # a folder to keep screenshots in
PATHS = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


def skip(why):
    print(f"SKIPPED the browser tests: {why}")
    sys.exit(75)


def browser():
    "Path of a Chromium; in CI it is installed where that is possible."
    find = lambda: next((p for n in NAMES if (p := shutil.which(n))), None)
    if find() or os.environ.get("BROWSER_INSTALL") != "1":
        return find() or skip(f"no {' or '.join(NAMES[:3])} on this machine (Debian: apt-get install chromium)")
    if os.geteuid() or not shutil.which("apt-get"):
        skip("no Chromium on this machine, and it takes root and apt-get to install one")
    for c in (["apt-get", "update", "-q"], ["apt-get", "install", "-yq", "--no-install-recommends", "chromium"]):
        r = subprocess.run(c, capture_output=True, text=True, env=os.environ | dict(DEBIAN_FRONTEND="noninteractive"))
        if r.returncode:
            skip(f"{' '.join(c)} failed: {(r.stderr or r.stdout).strip().splitlines()[-1:]}")
    return find() or skip("apt-get installed chromium, but none is found")


try:
    from playwright.sync_api import sync_playwright
except ImportError:
    skip("the Python package playwright is missing (pip install playwright)")


def until(what, test, seconds=60):
    "Wait for `test()` to be true."
    end = time.monotonic() + seconds
    while not (got := test()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.2)
    return got


# ---- JupyterLab


def lab(tmp):
    "JupyterLab on 127.0.0.1, with settings of its own; returns the process and its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, settings = secrets.token_hex(16), tmp / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(
        '{"windowingMode": "none"}'
    )  # every cell in the page, seen or not
    (other := tmp / "settings" / "@jupyterlab" / "apputils-extension").mkdir()
    (other / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    env = os.environ | dict(
        JUPYTER_TOKEN=token,
        JUPYTERLAB_SETTINGS_DIR=str(tmp / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(tmp / "ws"),
        JUPYTER_CONFIG_DIR=str(tmp / "config"),
        JUPYTER_RUNTIME_DIR=str(tmp / "run"),
        PYTHONPATH=PATHS,
        PATH=f"{bin}:{os.environ['PATH']}",
    )
    env.pop("IN_TEST", None)
    log = open(tmp / "lab.log", "w")
    p = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            f"--ServerApp.root_dir={nbs}",
        ],
        env=env,
        stdout=log,
        stderr=log,
    )

    def up():
        if p.poll() is not None:
            raise AssertionError(f"JupyterLab ended: {(tmp / 'lab.log').read_text()[-2000:]}")
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", port)) == 0

    until("JupyterLab", up)
    return p, f"http://127.0.0.1:{port}", token


DRAWN = """() => [...document.querySelectorAll('.js-plotly-plot')].map(g => {
  const box = g.getBoundingClientRect(), svg = g.querySelector('.main-svg')?.getBoundingClientRect();
  const ink = c => { const d = document.createElement('canvas'); d.width = c.width; d.height = c.height; if (!c.width || !c.height) return 0;
    const x = d.getContext('2d'); x.drawImage(c, 0, 0); return x.getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length; };
  return {width: box.width, height: box.height, svg: !!svg && svg.width > 100 && svg.height > 100, gl: g.data.some(t => t.type == 'scattergl'),
    marks: g.querySelectorAll('.heatmaplayer image, .scatterlayer path, .barlayer path, .histogram path').length, ink: [...g.querySelectorAll('canvas')].reduce((s, c) => s + ink(c), 0)}; })"""


def check_drawn(page, where):
    "Every plot of a page has a size and something drawn in it."
    got = page.evaluate(DRAWN)
    assert got, f"{where}: no plot"
    for k, g in enumerate(got):
        assert g["svg"] and g["width"] > 100 and g["height"] > 100 and (g["ink"] > 50 if g["gl"] else g["marks"] > 0), (
            f"{where}: plot {k + 1} is not drawn: {g}"
        )
    return len(got)


def shot(page, name):
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(keep) / f"{name}.png"))


@contextmanager
def notebook(b, tmp, name, ready):
    "A notebook in JupyterLab, all of it run; yields its page and what gives its errors once `ready(page)` is true."
    (tmp := tmp / name).mkdir()
    server, url, token = lab(tmp)
    page = None
    try:
        page = b.new_page(viewport=dict(width=1400, height=1500))
        page.goto(f"{url}/lab/tree/{name}.ipynb?reset&token={token}")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=120_000)
        until("the kernel", lambda: "| Idle" in page.locator("#jp-main-statusbar").inner_text(), 120)
        time.sleep(2)

        def started():  # asked too early, JupyterLab does nothing, or asks which kernel
            if (ask := page.locator(".jp-Dialog .jp-mod-accept")).count():
                ask.first.click()
                time.sleep(2)
            page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
            page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
            time.sleep(5)
            return any(p.strip() not in ("", "[ ]:") for p in page.locator(".jp-InputPrompt").all_inner_texts())

        until("the first cell", started, 120)
        errors = lambda: (
            page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
            + [
                t
                for t in page.locator(".jp-OutputArea-output").all_inner_texts()
                if any(
                    w in t
                    for w in ("Error displaying widget", "Error creating widget", "not JSON compliant", "Traceback")
                )
            ]
        )

        def done():
            assert not errors(), f"error in the notebook: {errors()[0][-1500:]}"
            return ready(page)

        try:
            until(f"{name} to run", done, 600)
        except AssertionError as e:
            raise AssertionError(
                f"{e}; cells: {' '.join(page.locator('.jp-InputPrompt').all_inner_texts())}; last output: {''.join(page.locator('.jp-OutputArea-output').all_inner_texts()[-1:])[-500:]}"
            ) from None
        yield page, errors
        assert not errors(), errors()[0][-1500:]
        page.close()
    except Exception:
        shot(page, f"{name}_failed") if page else None
        raise
    finally:
        server.terminate()
        server.wait(30)


def explore(b, tmp):
    "01_explore_masking in JupyterLab: run all, no error, move the slider, the figure changes."
    with notebook(
        b,
        tmp,
        "01_explore_masking",
        lambda page: (
            page.locator(".widget-slider .noUi-handle").count()
            and page.locator(".jupyter-widgets .js-plotly-plot .gtitle").count()
        ),
    ) as (page, errors):
        n = check_drawn(page, "01_explore_masking")
        assert n >= 5, f"{n} figures, expected 2 static ones for each of two models, and the one with sliders"
        fig = page.locator(".jupyter-widgets .js-plotly-plot").last
        fig.scroll_into_view_if_needed()
        state = lambda: (
            fig.locator(".gtitle").text_content(),
            fig.locator(".heatmaplayer image").evaluate_all(
                'xs => xs.map(x => x.getAttribute("href") || x.getAttribute("xlink:href")).join()'
            ),
        )
        before = state()
        shot(page, "explore_before")
        page.locator(".widget-slider .noUi-handle").first.focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        until("the figure to change with the slider", lambda: state()[0] != before[0] and state()[1] != before[1], 60)
        time.sleep(1)
        shot(page, "explore_after")
        check_drawn(page, "01_explore_masking, slider moved")


def lasso(page, box, spots):
    "Drag through spots of a box, each a share of its width and height."
    at = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in spots]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y, steps=6)
    page.mouse.up()


def choose(page, frame, name):
    "In each map in turn: what lies within a rectangle of it is chosen in all maps and listed; a double click lets go."
    fig = frame.locator("#maps")
    chosen = lambda: fig.evaluate(
        "g => g.data.map(t => t.selectedpoints ? [...t.selectedpoints].sort((a, b) => a - b).join() : null)"
    )
    inside = lambda k, at: fig.evaluate(
        """(g, [k, u0, v0, u1, v1]) => { const t = g._fullData[k], n = k ? k + 1 : '', X = g._fullLayout['xaxis' + n], Y = g._fullLayout['yaxis' + n];
        return [...t.x.keys()].filter(i => { const u = X.d2p(t.x[i])/X._length, v = Y.d2p(t.y[i])/Y._length; return u > u0 && u < u1 && v > v0 && v < v1; }); }""",
        [k, *at],
    )
    ids = fig.evaluate("g => g.data[0].customdata.map(c => c[0])")
    assert not any(chosen())
    for k, at in (
        (0, (0.1, 0.1, 0.55, 0.9)),
        (1, (0.2, 0.1, 0.9, 0.55)),
        (2, (0.45, 0.1, 0.9, 0.9)),
    ):  # away from the corners, which have handles
        want = inside(k, at)
        assert 0 < len(want) < len(ids), f"map {k + 1}: the lasso would hold {len(want)} of {len(ids)} points"
        box = frame.locator(".nsewdrag").nth(k).bounding_box()
        spots = [
            (box["x"] + u * box["width"], box["y"] + v * box["height"])
            for u, v in ((at[0], at[1]), (at[2], at[1]), (at[2], at[3]), (at[0], at[3]), (at[0], at[1]))
        ]
        page.mouse.move(*spots[0])
        page.mouse.down()
        for x, y in spots[1:]:
            page.mouse.move(x, y, steps=20)
        page.mouse.up()
        near = lambda: (
            (got := {*chosen()})
            and len(got) == 1
            and (p := got.pop())
            and len({*want} & (p := {*map(int, p.split(","))})) > 0.8 * len({*want} | p)
        )  # a lasso cuts corners a little
        try:
            until(f"the points of map {k + 1} in all maps", near, 30)
        except AssertionError as e:
            raise AssertionError(f"{e}: wanted {want[:20]}, got {[g and g[:60] for g in chosen()]}") from None
        now = [ids[int(i)] for i in chosen()[0].split(",")]
        assert frame.locator("#chosen").input_value().split() == now and frame.locator("#count").inner_text() == str(
            len(now)
        )
        shot(page, f"{name}_{k + 1}")
    box = frame.locator(".nsewdrag").nth(2).bounding_box()
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until("nothing to be chosen", lambda: not any(chosen()) and frame.locator("#count").inner_text() == "0", 30)


def umap_lab(b, tmp):
    "06_umap in JupyterLab: what is chosen in one map is chosen in all."
    last = lambda page: (
        page.locator(".jp-CodeCell .jp-InputPrompt").last.inner_text().strip() not in ("", "[ ]:", "[*]:")
    )
    with notebook(b, tmp, "06_umap", lambda page: last(page) and page.locator("iframe").count()) as (page, errors):
        page.locator("iframe").last.scroll_into_view_if_needed()
        frame = page.locator("iframe").last.element_handle().content_frame()
        frame.wait_for_selector("body[data-drawn=yes]")
        time.sleep(1)
        assert check_drawn(frame, "06_umap") == 1
        choose(page, frame, "umap_lab")


# ---- pages without a network


def offline(b, path):
    "Open a page with the network cut; every plot is drawn, nothing fails, nothing was asked of the network."
    context = b.new_context(viewport=dict(width=1300, height=900))
    context.set_offline(True)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda e: wrong.append(f"error: {e}"))
    page.on(
        "request",
        lambda r: (
            wrong.append(f"asked for {r.url[:100]}") if not r.url.startswith(("file:", "data:", "blob:")) else None
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.wait_for_function("!document.getElementById('plotly') || document.body.dataset.drawn", timeout=60_000)
    time.sleep(1.5)
    check_drawn(page, path.name)
    shot(page, path.stem)
    assert not wrong, f"{path.name}: {wrong[:3]}"
    return page


def umap(b, path):
    "The same, and without Python: a selection in one map shows in all, and the colour menu works."
    page = offline(b, path)
    choose(page, page.main_frame, path.stem)
    colours = lambda: page.evaluate(
        "JSON.stringify([document.getElementById('maps').layout.coloraxis.colorbar.title.text, document.getElementById('maps').data[0].marker.color])"
    )
    if page.locator(".updatemenu-header").count():
        before = colours()
        page.locator(".updatemenu-header").first.click()
        page.wait_for_selector(".updatemenu-dropdown-button")
        page.locator(".updatemenu-dropdown-button").first.click()
        until("other colours", lambda: colours() != before, 20)
        shot(page, f"{path.stem}_coloured")


def paired_bootstrap(b, path):
    "The same on a phone: nothing is wider than the screen, and every entry of the contents leads somewhere."
    page = offline(b, path)
    links = page.locator("nav a").evaluate_all("xs => xs.map(x => x.getAttribute('href'))")
    assert len(links) > 5 and all(page.locator(l).count() == 1 for l in links), f"{path.name}: contents {links}"
    assert path.stat().st_size < 5e6, f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; expected under 5"
    page.set_viewport_size(dict(width=390, height=844))
    page.reload()
    page.wait_for_selector("body[data-drawn=yes]")
    time.sleep(1)
    check_drawn(page, f"{path.name}, 390 pixels wide")
    shot(page, f"{path.stem}_phone")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, f"{path.name}: {wide} pixels wide on a screen of 390"


def main():
    exe, failed, ran = browser(), 0, 0
    table, made, png = (root / "data" / f"browser{end}" for end in (".tsv", "-umap.html", "-umap.png"))
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as pw:
        try:
            b = pw.chromium.launch(
                executable_path=exe,
                args=[
                    "--no-sandbox",
                    "--disable-dev-shm-usage",
                    "--use-angle=swiftshader",
                    "--enable-unsafe-swiftshader",
                    "--disable-background-networking",
                ],
            )
        except Exception as e:
            skip(f"{exe} does not start: {str(e).strip().splitlines()[0]}")
        print(f"{exe} {b.version}", flush=True)

        def umap_page():
            from protmae.data.synthetic import open_store

            s = open_store(root / "data" / "demo.h5")
            table.write_text(
                "id\tgroup\n" + "".join(f"{p}\t<b>{'even' if k % 2 else 'odd'}</b>\n" for k, p in enumerate(s.ids))
            )
            r = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "papermill",
                    "06_umap.ipynb",
                    "../data/06.out.ipynb",
                    "--cwd",
                    ".",
                    "-p",
                    "page",
                    f"../data/{made.name}",
                    "-p",
                    "annotations",
                    f"../data/{table.name}",
                    "-p",
                    "png",
                    f"../data/{png.name}",
                ],
                cwd=nbs,
                capture_output=True,
                text=True,
                env=os.environ | dict(PYTHONPATH=PATHS, PATH=f"{bin}:{os.environ['PATH']}"),
            )
            assert not r.returncode, f"06_umap.ipynb failed: {r.stderr[-2000:]}"
            umap(b, made)
            if find_spec("kaleido"):
                assert png.exists() and png.stat().st_size > 20_000, "kaleido is here, and 06_umap.ipynb wrote no PNG"
            else:
                print("no PNG: the package kaleido is missing")

        def compare_page():
            r = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "papermill",
                    "05_compare.ipynb",
                    "../data/05.out.ipynb",
                    "--cwd",
                    ".",
                    "-p",
                    "out",
                    "../data/browser-compare.html",
                ],
                cwd=nbs,
                capture_output=True,
                text=True,
                env=os.environ | dict(PYTHONPATH=PATHS, PATH=f"{bin}:{os.environ['PATH']}"),
            )
            assert not r.returncode, f"05_compare.ipynb failed: {r.stderr[-2000:]}"
            paired_bootstrap(b, root / "data" / "browser-compare.html")

        tests = {
            "JupyterLab: 01_explore_masking, slider": lambda: explore(b, Path(tmp)),
            "JupyterLab: 06_umap, linked selection": lambda: umap_lab(b, Path(tmp)),
            "06_umap by papermill, its page offline: linked selection, colours": umap_page,
            "05_compare by papermill, its page offline, wide and on a phone": compare_page,
        }
        tests |= {
            f"{p.relative_to(root)} offline": lambda p=p: offline(b, p)
            for p in sorted((root / "reports").rglob("*.html"))
        }
        for name, test in tests.items():
            if not all(w in name for w in sys.argv[2:]):
                continue
            t = time.perf_counter()
            ran += 1
            try:
                test()
                print(f"passed  {name}  ({time.perf_counter() - t:.0f} s)", flush=True)
            except Exception as e:
                failed += 1
                print(f"FAILED  {name}\n{type(e).__name__}: {e}", flush=True)
        b.close()
    print(f"browser: {ran - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(root))
    main()
