# make install   creates .venv            make demo   trains, finetunes and tries a small model on CPUs
# make test      all tests but faults on a simulated cluster (LONG=1 adds them)
# make lint      formatting, ruff, mypy, import contracts, style, generated pages

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
NUMERICS := tests/ops tests/models tests/optim tests/distributed tests/training/test_layouts.py

.PHONY: install demo test test-avx2 lint
install: .venv/installed

# torch is installed first and alone: deepspeed's build reads the installed version.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo 'use make PYTHON=python3.11 or newer'; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

demo: install
	mkdir -p $(DEMO)
	$(BIN)/python tools/gather_stdlib.py $(DEMO)/train.jsonl --valid $(DEMO)/valid.jsonl --without-held-out
	$(BIN)/megatrain train-tokenizer $(DEMO)/train.jsonl --vocab-size 4096 --special-token '<|im_start|>' --special-token '<|im_end|>' --output $(DEMO)/tokenizer
	$(BIN)/megatrain preprocess $(DEMO)/train.jsonl --tokenizer $(DEMO)/tokenizer --output $(DEMO)/train
	$(BIN)/megatrain preprocess $(DEMO)/valid.jsonl --tokenizer $(DEMO)/tokenizer --output $(DEMO)/valid
	$(BIN)/megatrain pretrain configs/demo_cpu.yaml
	$(BIN)/python tools/try_model.py $(DEMO)/run
	$(BIN)/python tools/gather_docstrings.py $(DEMO)/questions.jsonl --valid $(DEMO)/questions_valid.jsonl --held-out $(DEMO)/questions_held_out.jsonl
	$(BIN)/megatrain finetune configs/finetune_sft_demo_cpu.yaml
	$(BIN)/python tools/try_chat.py $(DEMO)/chat $(DEMO)/questions_held_out.jsonl

test: install
	$(BIN)/python -m pytest $(if $(LONG),,-m 'not chaos')

# The numerics with the instructions of a CPU that has neither AVX-512 nor AMX.
test-avx2: install
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(NUMERICS)

lint: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_style.py
	$(BIN)/python tools/make_architecture.py --check
