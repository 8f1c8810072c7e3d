# `make help` lists the verbs. Each sets up what it needs from nothing: Python 3.11, make and gcc are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch~=2.13.0
# what is installed must be the files that were locked; `make setup HASHES=` takes what another index has instead
HASHES ?= requirements.hashes
BIN    := .venv/bin
READY  := .venv/ready
DOCS   := .venv/docs-ready
# three on two cores: much of what a live test takes is waiting, for sockets, signals and other processes
PYTEST := $(BIN)/python -m pytest -q -n 3
PASSES := .cache/test-passes.jsonl
BESIDE := .cache/test-beside.log
# what the job notebooks write under test does not mix with what a person has made, and nothing goes to an exchange;
# CI: hypothesis has no deadlines in a chapter, and the same examples each time
APART  := CI=1 TRADELAB_VENUE=localnet TRADELAB_DATA=.cache/test/data TRADELAB_RUNS=.cache/test/runs TRADELAB_SESSIONS=.cache/test/sessions \
          TRADELAB_LOGS=.cache/test/logs TRADELAB_DATABASE=sqlite:///.cache/test/tradelab.db

# dozens of processes read the modules that the first of them has compiled
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test compiled beside notebooks export docs readme lab benchmark degraded audit lock clean
.DEFAULT_GOAL := help

help: ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1 | \2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null || grep -E '^[a-z]+:.*##' Makefile

setup: $(READY) ## install everything into .venv (TORCH="..." chooses another build of torch; HASHES= checks no hashes)

# torch has many builds: it and what it brings for a graphics card are the only files that are not checked
$(READY): settings.ini setup.py requirements.lock
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "tradelab needs Python 3.11 and did not find it: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(HASHES),$(BIN)/python -m pip install --disable-pip-version-check -q --require-hashes --no-deps -r $(HASHES) || \
	  { echo "a package is not the file that was locked: see above; make setup HASHES= takes it all the same"; exit 1; })
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e ".[dev]"
	@touch $@

demo: $(READY) ## train an agent, test it, trade it live on localnet, replay, report
	$(BIN)/tradelab run train -p span 2020-01-01/2022-07-01 -p steps 100000
	$(BIN)/tradelab run backtest -p policy latest
	$(BIN)/tradelab run live -p policy latest -p venue localnet -p candles 300
	$(BIN)/tradelab run replay
	$(BIN)/tradelab run report -p policy latest -p session latest
	@echo; echo "Where to look:"; for job in train backtest live replay report; do ls -t reports/$$job/*.html | head -1 | sed 's/^/  /'; done

test: $(READY) ## style, types, tests, all notebooks, coverage; ends with what was skipped
	@mkdir -p .cache && : > $(PASSES)
	$(BIN)/ruff check -q nbs tradelab tests conftest.py .ci benchmarks
	@$(MAKE) --no-print-directory beside > $(BESIDE) 2>&1 & beside=$$!; \
	  trap "kill $$beside 2>/dev/null" INT TERM; \
	  $(MAKE) --no-print-directory compiled; compiled=$$?; \
	  wait $$beside; beside=$$?; cat $(BESIDE); exit $$((compiled + beside))
	@$(BIN)/python .ci/summary.py $(PASSES) && rm $(PASSES)

# one pass waits for sockets and signals, the other computes: together they use both cores
compiled:
	@echo "--- compilation, once for all; types and uncompiled chapters beside it, in $(BESIDE)"
	$(BIN)/python benchmarks/cold_compile.py
	@echo "--- tests"
	$(PYTEST) --dist loadfile --no-loadscope-reorder tests
	@echo "--- all notebooks, cell by cell"
	@rm -rf .cache/test; mkdir -p .cache/test
	$(APART) $(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout 1800 --nbval-kernel-startup-timeout 1800 --dist loadfile nbs

beside:
	@echo "--- types"
	$(BIN)/mypy
	@echo "--- the chapters against the package, uncompiled, for coverage"
	@$(BIN)/python -m coverage erase
	NUMBA_DISABLE_JIT=1 $(BIN)/python -m coverage run -m pytest -q -m uncompiled tests
	@$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report --skip-covered --fail-under=90

notebooks: $(READY) ## execute all chapters in place and clean them
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --log-level WARN nbs/*/*.ipynb nbs/index.ipynb
	$(BIN)/nbdev_clean

export: $(READY) ## notebooks -> tradelab/
	$(BIN)/nbdev_export
	$(BIN)/python .ci/assets.py
	$(BIN)/nbdev_clean

docs: $(DOCS) ## build the site of chapters and API, to be read from its files
	$(BIN)/python .ci/docs/build.py

$(DOCS): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock -e ".[docs]"
	@touch $@

readme: $(READY) ## nbs/index.ipynb -> README.md
	$(BIN)/python .ci/readme.py

lab: $(READY) ## open JupyterLab
	$(BIN)/jupyter lab --config=.ci/jupyter_server_config.py nbs

benchmark: $(READY) ## print what was measured
	$(BIN)/python benchmarks/measure.py

degraded: $(READY) ## compare what was measured with benchmarks/baselines.json
	$(BIN)/python benchmarks/check.py

audit: $(READY) ## is it what was locked, and does anybody know a weakness of it?
	$(BIN)/python .ci/audit.py

lock: $(READY) ## write the versions of .venv into requirements.lock, and the hashes of their files beside it
	@echo "# Exact versions that were tested together; made with: make lock" > requirements.lock
	@$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' | grep -v ' @ ' >> requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check -q --target .cache/uv "uv~=0.13.9"
	@grep -v '^torch==' requirements.lock | .cache/uv/bin/uv pip compile - -q --no-config --generate-hashes --no-deps \
	  --no-annotate --no-header --python-version 3.11 -o requirements.hashes
	@touch $(READY)

clean: ## remove what can be made again; data, runs, sessions, reports and settings stay
	rm -rf build dist tradelab.egg-info .cache .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find nbs tradelab tests -name .ipynb_checkpoints -o -name __pycache__ -o -name .hypothesis | xargs rm -rf
