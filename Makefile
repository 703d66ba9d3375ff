# Two commands do everything: `make quickstart` and `make test`. Both make .venv first if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SAMPLE := data_pipelines/sample
RUN ?= runs/quickstart
STEPS ?=
# Whole files go to a process each: what a file makes once is made once.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile --durations 10

.PHONY: quickstart test slow interop interop5 lint clean

# A .venv whose install was cut short is installed again: the stamp is written last.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.interop: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test,interop]'
	touch $@

# Train, evaluate on pictures of things never seen, export the encoder, print one table.
quickstart: $(VENV)/.installed
	$(BIN)/siglip train configs/quickstart.py --workdir $(RUN) $(if $(STEPS),--total-steps $(STEPS) --optim.warmup-steps 1)
	$(BIN)/python benchmarks/ridge_floor.py --train '$(SAMPLE)/emoji-train-*.tar' \
	    --heldout '$(SAMPLE)/emoji-heldout-*.tar' --out $(RUN)/ridge_floor.json > /dev/null
	test -e $(RUN)/encoder || $(BIN)/siglip export $(RUN) --format hf --tower image --out $(RUN)/encoder
	$(BIN)/siglip report $(RUN) --baseline $(RUN)/ridge_floor.json
	@echo "encoder: $(RUN)/encoder"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not slow' -rs $(PARALLEL)

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -rs $(PARALLEL)

# What needs torch and transformers, exports read back by their users; and libtpu, programs compiled for a pod.
interop: $(VENV)/.interop
	$(BIN)/python -m pytest -m interop -rs $(PARALLEL)

# The same exports in transformers 5, beside the version 4 of .venv.
interop5: $(VENV)/.interop
	tests/transformers5.sh $(BIN)/python $(PARALLEL)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg

clean:
	rm -rf $(VENV) runs build *.egg-info
