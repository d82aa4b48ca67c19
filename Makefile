# make study   set up, then run the main job: four architectures on real text, in minutes, on a CPU
# make test    set up with the development extras, then pass the tests
# make lint    style and types
# make setup   .venv with .venv/bin/hinny, nothing more
PYTHON ?= python3
# one pinned torch; CONSTRAINTS= takes the newest that your index offers, which on Linux means CUDA
CONSTRAINTS ?= -c constraints/cpu.txt
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(CONSTRAINTS)

.PHONY: study test lint setup clean

study: setup
	$(VENV)/bin/hinny study quick

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

setup: $(VENV)/.runtime

# remembers which constraints the environment was made with
$(VENV)/.constraints: FORCE
	@mkdir -p $(VENV)
	@echo '$(CONSTRAINTS)' | cmp -s - $@ || echo '$(CONSTRAINTS)' > $@

FORCE:

$(VENV)/.runtime: pyproject.toml constraints/cpu.txt $(VENV)/.constraints
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hinny needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache
