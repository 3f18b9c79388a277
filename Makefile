# make demo   trains a tiny policy on real photographs: about two minutes on two CPU cores
# make test   the whole test suite
# make lint   style and types

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed data/photos/heldout.jsonl
	$(BIN)/deepspeed --num_gpus 2 -m ds_inpaint.run recipes/tiny/grpo_sd.yaml

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy ds_inpaint reward_servers

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

data/photos/heldout.jsonl: ds_inpaint/photos.py | .venv/installed
	$(BIN)/python -m ds_inpaint.photos data/photos
