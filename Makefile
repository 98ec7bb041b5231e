# make VENV=$VIRTUAL_ENV ... installs into and uses an environment that already exists.
PYTHON ?= python3
VENV ?= .venv

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.clusterformer-installed
OLDEST = transformers==5.17.0
OLDEST_VENV = $(VENV)-oldest
OLDEST_INSTALLED = $(OLDEST_VENV)/.clusterformer-installed
PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"

.DEFAULT_GOAL = help
.PHONY: help install demo demo-detection demo-segmentation test test-slow test-slurm test-interruptions style quality \
	conformance conformance-min benchmark clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED) ## create .venv and install everything

demo: $(INSTALLED) ## train, save, reload and draw a small model on real digits
	$(BIN)/python scripts/quickstart.py

demo-detection: $(INSTALLED) ## train a small detector on digit scenes and draw what it sees, in half an hour
	$(BIN)/python scripts/demo_detection.py

demo-segmentation: $(INSTALLED) ## train a small panoptic model on digit scenes and draw what it finds beside the truth
	$(BIN)/python scripts/demo_segmentation.py

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest -q tests

test-slow: $(INSTALLED) ## run the slow tests: several processes, kills, exports with open sizes
	$(BIN)/python -m pytest -q --dist worksteal -m slow tests

test-slurm: $(INSTALLED) ## run jobs on a real Slurm, which it starts and stops; needs root
	$(BIN)/python -m pytest -q -n 0 tests/slurm/jobs.py

test-interruptions: $(INSTALLED) ## kill a training twenty times at random moments
	NUM_KILLS=20 $(BIN)/python -m pytest -q -n 0 -m "slow or not slow" tests/test_interruptions.py

style: $(INSTALLED) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED) ## check the format and the code, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

conformance: $(INSTALLED) ## run the common tests of transformers on our classes
	$(BIN)/python -m pytest -q --dist worksteal -m "slow or not slow" tests/test_conformance.py

# Export with open sizes is left out: PyTorch, which both environments share, traces for longer than all the rest takes.
conformance-min: $(OLDEST_INSTALLED) ## the same, and repositories for the Hub, on the oldest supported transformers
	$(OLDEST_VENV)/bin/python -m pytest -q --dist worksteal -m "slow or not slow" -k "not dynamic" \
		tests/test_conformance.py tests/test_hub.py

benchmark: $(INSTALLED) ## measure speed and memory beside other models
	$(BIN)/python scripts/benchmark.py

clean: ## remove the environments and every cache
	rm -rf .venv .venv-oldest .cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e ".[dev]"
	touch $@

# Holds the oldest transformers and what it needs; the rest, pip included, comes from the main environment.
$(OLDEST_INSTALLED): $(INSTALLED) Makefile
	$(BIN)/python -m venv --clear --without-pip $(OLDEST_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(PURELIB))')" \
		> "$$($(OLDEST_VENV)/bin/python -c $(PURELIB))/main_environment.pth"
	$(OLDEST_VENV)/bin/python -m pip install $(OLDEST)
	touch $@
