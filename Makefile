# Two commands do everything: `make quickstart` and `make test`. Both make .venv first if there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SAMPLE := data_pipelines/sample
QUALITY ?=
RUN ?= runs/quickstart$(QUALITY:%=-%)
STEPS ?=
# Whole files go to a process each, the longest first (tests/conftest.py): what a file makes once is made once. One process more than
# there are cores, since some tests wait. Compiled programs stay in .pytest_cache/xla.
JOBS ?= $(shell expr `getconf _NPROCESSORS_ONLN` + 1)
PARALLEL ?= -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 10
# The workers and the processes that tests start find our modules compiled, also where the shell says that Python writes no bytecode.
test slow isa interop interop5 aot newest: export PYTHONDONTWRITEBYTECODE :=
# What compares numbers that floating point rounds: with XLA's optimizations. All else compiles faster without (tests/conftest.py),
# also where two programs of ours are compared (sharding, micro-batches): those are not in this list.
NUMERICS := $(addprefix tests/siglip/, models training/test_optim.py test_losses.py formats/test_big_vision.py \
    evaluation/test_metrics.py evaluation/test_evaluators.py)
# The instruction sets of this processor that XLA knows by name; none where there is no /proc/cpuinfo.
ISA ?= $(shell tr ' ' '\n' < /proc/cpuinfo 2> /dev/null \
    | awk '/^sse4_2$$/ {a = "SSE4_2"} /^avx2$$/ {b = "AVX2"} /^avx512f$$/ {c = "AVX512"} END {print a, b, c}')

.PHONY: quickstart sample test isa isa-names slow interop interop5 aot agreement newest lint clean

# A .venv whose install was cut short is installed again: the stamp is written last.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.interop: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test,interop]'
	touch $@

# Train, evaluate on what training never shows, export both towers, print the tables. QUALITY=long trains for an hour.
# With large pages (glibc 2.35 or later) a step of XLA's on the CPU takes a quarter less time: it gets all of its memory anew.
quickstart: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
quickstart: $(VENV)/.installed
	$(if $(filter-out long,$(QUALITY)),$(error QUALITY=$(QUALITY) is unknown; use QUALITY=long, or leave it out))
	$(BIN)/siglip train configs/quickstart.py --workdir $(RUN) \
	    $(if $(STEPS),--total-steps $(STEPS) --optim.warmup-steps 1,$(if $(QUALITY),--total-steps 13000))
	rm -rf $(RUN)-encoder
	$(BIN)/siglip export $(RUN) --format hf --tower both --out $(RUN)-encoder
	rm -rf $(RUN)/encoder
	mv $(RUN)-encoder $(RUN)/encoder
	$(BIN)/siglip report $(RUN)
	@echo "encoder: $(RUN)/encoder"
	@echo "next:    $(BIN)/siglip demo $(RUN) --data $(SAMPLE)/unseen-style.parquet      # search in the browser"
	@echo "         $(BIN)/siglip train configs/siglit.py --init.src $(RUN)               # a new text tower on the frozen ViT"
	@echo "         $(BIN)/siglip eval $(RUN) --suite configs/suites/flags.yaml --out $(RUN)/flags   # name flags in twelve languages"
	@echo "pairs of your own: docs/your-own-data.md"

# Remakes the shipped sample from packages of public registries (the extra `sample`): shards, manifest, tokenizer.
sample: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[sample]'
	$(BIN)/python -m data_pipelines.sample.build --out $(SAMPLE)
	rm -rf build/curated-*
	for kind in emoji icons; do \
	    (cd $(SAMPLE) && $(CURDIR)/$(BIN)/siglip data curate "$$kind-*.parquet" --out $(CURDIR)/build/curated-$$kind \
	        --against unseen-style.parquet unseen-ideas.parquet flags.parquet $$(test $$kind = emoji || echo --duplicate-bits 3)) && \
	    mkdir -p $(SAMPLE)/curated-$$kind && \
	    cp build/curated-$$kind/*.parquet build/curated-$$kind/funnel.json $(SAMPLE)/curated-$$kind || exit 1; \
	done
	$(BIN)/siglip data tokenizer '$(SAMPLE)/emoji-*.parquet' '$(SAMPLE)/icons-*.parquet' --out $(SAMPLE)/sample.model \
	    --vocab-size 8000 --repeat captions.en 4

test: $(VENV)/.installed
	OPTIMIZED=1 $(BIN)/python -m pytest -m 'not slow and not interop' -rs $(PARALLEL) $(NUMERICS)
	$(BIN)/python -m pytest -m 'not slow and not interop' -rs $(PARALLEL) $(addprefix --ignore=,$(NUMERICS))

# Every instruction set adds numbers in an order of its own: tests of numbers must hold for each.
isa: $(VENV)/.installed
	for isa in $(ISA); do \
	    echo "--xla_cpu_max_isa=$$isa"; \
	    OPTIMIZED=1 XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_max_isa=$$isa" \
	        $(BIN)/python -m pytest -m 'not slow and not interop' -rs $(PARALLEL) $(NUMERICS) \
	        $(addprefix tests/siglip/, training/test_accumulation.py parallel/test_sharding.py) || exit 1; \
	done

isa-names:
	@echo $(ISA)

slow: $(VENV)/.installed
	OPTIMIZED=1 $(BIN)/python -m pytest -m 'slow and not interop' -rs $(PARALLEL) $(NUMERICS)
	$(BIN)/python -m pytest -m 'slow and not interop' -rs $(PARALLEL) $(addprefix --ignore=,$(NUMERICS))

# What needs torch and transformers, exports read back by their users; and libtpu, programs compiled for a pod.
interop: $(VENV)/.interop
	OPTIMIZED=1 $(BIN)/python -m pytest -m interop -rs $(PARALLEL)

# The same exports in transformers 5, beside the version 4 of .venv.
interop5: $(VENV)/.interop
	OPTIMIZED=1 tests/transformers5.sh $(BIN)/python $(PARALLEL)

# The training step compiled for an H100: jax's CUDA plugin without CUDA, in a folder of its own (the extra `aot` in setup.cfg).
AOT := build/aot
$(AOT)/.installed: $(VENV)/.installed
	$(PIP) install -c constraints.txt --no-deps --upgrade --target $(AOT) jax-cuda13-plugin jax-cuda13-pjrt
	touch $@

aot: $(AOT)/.installed
	PYTHONPATH=$(AOT) $(BIN)/python -c 'import jax_plugins.xla_cuda13'  # without it every test is skipped
	OPTIMIZED=1 PYTHONPATH=$(AOT) $(BIN)/python -m pytest -rs tests/siglip/training/test_gpu_ahead_of_time.py \
	  tests/siglip/planning/test_ahead_of_time.py::test_a_step_for_eight_gpus

# Our metrics beside CLIP_benchmark's and scikit-learn's.
agreement: $(VENV)/.interop
	tests/clip_benchmark.sh $(BIN)/python

# The fast tests on newer Pythons (`make newest NEWEST="python3.12 …"`), with nothing pinned.
NEWEST ?= python3.12 python3.13
newest:
	for python in $(NEWEST); do tests/newest.sh $$python $(PARALLEL) || exit 1; done

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg

clean:
	rm -rf $(VENV) .pytest_cache runs build *.egg-info
