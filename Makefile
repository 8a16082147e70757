# make install   an environment in .venv     make demo   a small model from files to transformers to answers, on any machine
# make test      all tests but faults on a cluster (LONG=1: those too, minutes)     make lint   ruff and mypy

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: install demo test lint
install: .venv/installed

# torch first and alone: deepspeed's build looks at the torch that is there.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo 'make PYTHON=python3.11 or newer'; exit 1)
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

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
