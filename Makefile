# make install | train | check | test | docs | clean. PYTHON chooses the interpreter (3.10 to 3.12); on a GPU machine the same commands use the GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A GPU machine gets torch's CUDA build and the extra `gpu` (xformers), as wheels; a machine without one must not fetch them.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),constraints-gpu.txt,constraints.txt)
# What torch's CUDA build pins; tests compile the kernels with it beside the project's own, and skip that where it cannot be had.
CUDA_TRITON := 3.7.1
CONFIG ?= configs/tiny_ocr.json
# Test processes side by side; each gets its share of the cores.
WORKERS ?= 2

.PHONY: install train lint check test docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt constraints-gpu.txt scripts/install.sh
	PYTHON=$(PYTHON) scripts/install.sh $(VENV) $(CONSTRAINTS)
	touch $@

train: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed engine/train.py --config $(CONFIG) $(ARGS)

test: install $(VENV)/triton-$(CUDA_TRITON)
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The documentation site, in site/; a warning is an error.
docs: install
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# Style, spelling and types; seconds once mypy has its cache.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# What to run before each commit.
check: lint
	$(BIN)/python -m pytest tests -m unit -n $(WORKERS) --dist loadfile -q $(ARGS)

$(VENV)/triton-$(CUDA_TRITON): | install
	-$(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $@ triton==$(CUDA_TRITON)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache engine/*.egg-info
