# make run: environment, data, a short training run and a sample, from nothing. make test: the same environment, the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test
run: .venv/ready
	$(BIN)/python prepare_data.py
	$(BIN)/torchrun --standalone --nproc_per_node=1 train.py config/tbp.py config/laptop.py --init_from=auto
	$(BIN)/python sample.py --out_dir=out/laptop-tbp

test: .venv/ready
	$(BIN)/python -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, not " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
