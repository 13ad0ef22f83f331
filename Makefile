# Each target makes what it needs and can be the first command on a clean clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and checks run small things on many threads badly: one thread each, and a process for each core in place of it, four at the most. The
# tests of a file stay together, since they share what it makes once.
ONE_THREAD := OMP_NUM_THREADS=1
TEST := $(ONE_THREAD) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint check docs soak fix lock wheel release clean

demo: $(VENV)/.demo
	$(BIN)/muntin demo

test: $(VENV)/.dev
	$(TEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(TEST) -m "not slow and not soak"

docs: $(VENV)/.docs
	$(BIN)/mkdocs build

soak: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -m soak -s

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: # deploy/requirements.txt: what the server's image installs, with digests
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.4'
	$(VENV)-lock/bin/pip-compile --quiet --extra serve --all-build-deps --generate-hashes --strip-extras --allow-unsafe --upgrade \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-header --output-file deploy/requirements.txt pyproject.toml
	rm -rf $(VENV)-lock

wheel: $(VENV)/.dev
	$(BIN)/python -m build .

release: $(VENV)/.dev
	$(BIN)/python deploy/check_release.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(VENV)/.dev: pyproject.toml benchmarks/start_triton.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check 'perf-analyzer>=2.60' # no wheel for older Linux: its tests are skipped
	-$(BIN)/python benchmarks/start_triton.py --install # as above: a real Triton, 55 MB
	touch $@ $(VENV)/.demo $(VENV)/.docs

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
