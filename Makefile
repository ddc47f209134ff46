# The two commands of the README. Each makes .venv on first use; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: demo test bench install clean

demo: install
	.venv/bin/mpdsgr demo

test: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal

bench: install
	.venv/bin/python benchmarks/step.py
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/linear.py
	.venv/bin/python benchmarks/growth.py
	.venv/bin/python benchmarks/memory.py
	.venv/bin/python benchmarks/estimate.py
	.venv/bin/python benchmarks/inference.py
	.venv/bin/python benchmarks/attack.py
	.venv/bin/python benchmarks/serving.py

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; say which with: make PYTHON=python3.12"; exit 1; }
	@echo "installing into .venv (torch and its CUDA libraries are about 5 GB; some minutes) ..."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs/demo
