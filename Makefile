# The two commands of the README are `make demo` and `make test`. Each makes .venv on first use and installs what it
# needs; PYTHON chooses the interpreter (3.11, 3.12 or 3.13).
PYTHON ?= python3
DEMO_EXTRAS := cpu,report,train
LOWEST := .venv-lowest
# Builds of torch without CUDA. PyPI has none for Linux, so this index is used where it can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-lowest bench clean

demo: .venv/.demo
	.venv/bin/mpdsgr demo

test: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@# mypy takes the core that tests leave free while they wait for servers
	.venv/bin/mypy & types=$$!; OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist worksteal && wait $$types

# The oldest versions that pyproject.toml allows, in an environment of their own: the tests that need no torch.
# Old releases use what newer ones of their own dependencies deprecate: these warnings are not errors here.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
	  --extra cpu --extra openvino --extra parquet --extra report --extra serve --extra sign pyproject.toml -o $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt -r tests/requirements.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps -e .
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist worksteal \
	  -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning

bench: .venv/.dev
	.venv/bin/python benchmarks/step.py
	.venv/bin/python benchmarks/neurons.py
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/linear.py
	.venv/bin/python benchmarks/growth.py
	.venv/bin/python benchmarks/memory.py
	.venv/bin/python benchmarks/estimate.py
	.venv/bin/python benchmarks/inference.py
	.venv/bin/python benchmarks/nodes.py
	.venv/bin/python benchmarks/attack.py
	.venv/bin/python benchmarks/serving.py

# $(call install,EXTRAS): into .venv. Without an NVIDIA GPU, torch comes without CUDA where the index of CPU builds can be
# reached, else from PyPI with CUDA.
define install
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
  { echo "Python 3.11, 3.12 or 3.13 is needed; say which with: make PYTHON=python3.12"; exit 1; }
@test -x .venv/bin/python || $(PYTHON) -m venv .venv
@index=; if nvidia-smi >/dev/null 2>&1; then echo "installing into .venv, torch with CUDA ..."; \
  elif $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
  then index="--extra-index-url $(CPU_INDEX)"; echo "installing into .venv, torch for the CPU ..."; \
  else echo "installing into .venv, torch with CUDA, which PyPI has only: some GB, some minutes ..."; fi; \
  .venv/bin/python -m pip install --quiet --disable-pip-version-check $$index -c constraints.txt -e '.[$(1)]'
@touch $@
endef

.venv/.demo: pyproject.toml constraints.txt
	$(call install,$(DEMO_EXTRAS))

.venv/.dev: pyproject.toml constraints.txt
	$(call install,dev)
	@touch .venv/.demo

clean:
	rm -rf .venv $(LOWEST) runs/demo
