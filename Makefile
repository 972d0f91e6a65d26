# Every target makes its own environment first: Python 3.11+ with venv is all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip would compile on one core: compileall, at the end, takes all of them.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile
export OMP_NUM_THREADS ?= 1

# The CPU build where there is no NVIDIA GPU: from PyTorch's own index, else whatever the default index has.
TORCH_CPU := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: install demo test test-slow test-faults bench lint clean

install: $(VENV)/.installed

demo: install
	$(BIN)/medblip demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

test-faults: install
	PYTHONPATH=.:tests $(BIN)/python -m faults --lanes 2 --write

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	@for script in $$(grep -l __main__ bench/*.py); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf demo build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or newer is needed; name one: make install PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) "setuptools>=77" wheel
	@if nvidia-smi >/dev/null 2>&1; then \
	    echo "installing PyTorch for the GPU"; $(PIP) "torch>=2.6"; \
	else \
	    echo "installing PyTorch for the CPU"; \
	    $(PIP) --no-deps --timeout 15 --retries 1 --index-url $(TORCH_CPU_INDEX) $(TORCH_CPU) 2>/dev/null \
	        || echo "no answer from $(TORCH_CPU_INDEX), asking the default index"; \
	    $(PIP) $(TORCH_CPU); \
	fi
	@echo "installing MedBLIP and the rest"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@touch $@
