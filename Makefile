# make run      environment, data, a short training run and three samples, from nothing
# make test     environment, all tests but the long ones; make quick: the fast ones, while you edit
# make lint     what ruff says of the style; make format: mend what ruff can mend by itself
# make test-torch TORCH=2.11.0    the tests of compiled code with another version of torch
PYTHON ?= python3
TORCH ?= 2.11.0
BIN := .venv/bin
OTHER := .venv-torch-$(TORCH)

# Without the compiled modules that Python keeps, importing torch takes seconds more, each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test quick lint format test-torch

run: .venv/ready
	$(BIN)/python prepare_data.py
	$(BIN)/torchrun --standalone --nproc_per_node=1 train.py config/tbp.py config/laptop.py --init_from=auto
	$(BIN)/python sample.py --out_dir=out/laptop-tbp

test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist=worksteal

quick: .venv/ready-dev
	$(BIN)/python -m pytest -m quick

lint: .venv/ready-dev
	$(BIN)/ruff check --output-format=concise .
	$(BIN)/ruff format --check --output-format=concise .

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-torch: $(OTHER)/ready
	$(OTHER)/bin/python -m pytest -m quick
	$(OTHER)/bin/python -m pytest tests/test_model.py tests/test_recipe.py
	$(OTHER)/bin/python -m pytest tests/test_torch_versions.py --long

# A user's environment, then what the tests add to it. A stamp file says that a step is done.
# Compiling all modules takes pip almost a minute, and Python compiles those that are imported.
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, not " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install -q --no-compile -r requirements-dev.txt
	touch $@

# The pins of requirements.txt and requirements-dev.txt, but for torch's.
$(OTHER)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(OTHER)
	grep -hv '^torch==' requirements.txt requirements-dev.txt > $(OTHER)/requirements.txt
	$(OTHER)/bin/python -m pip install -q --no-compile torch==$(TORCH) -r $(OTHER)/requirements.txt
	touch $@
