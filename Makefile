# Every target makes the environment it needs; nothing has to be run first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

MODEL ?= A0
PRECISION ?= int8
WEIGHTS ?=
CALIB ?=
TARGET ?=
BACKEND ?=
BATCH ?=
IMAGE_SIZE ?=
OUT ?=
ARGS ?=
CONFIG ?= parity.toml
BASELINE ?= parity-baseline.json
BUNDLE = $(or $(OUT),build/$(MODEL)-$(PRECISION))

# One word of the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
option = $(if $(2),$(1) $(call quoted,$(2)))
ENGINE = $(BIN)/repvgg-export engine $(call quoted,$(MODEL)) --precision $(call quoted,$(PRECISION)) \
	$(call option,--weights,$(WEIGHTS)) $(call option,--calib,$(CALIB)) \
	$(call option,--target,$(TARGET)) $(call option,--backend,$(BACKEND)) \
	$(call option,--batch,$(BATCH)) $(call option,--image-size,$(IMAGE_SIZE)) \
	--out $(call quoted,$(BUNDLE)) $(ARGS)

.PHONY: engine parity test test-slow lint format benchmark benchmark-paper benchmark-pipeline \
	engine-table fuzz docs audit gpu-test clean

engine: $(READY)
	@$(ENGINE)

# Alone: the cases of CONFIG, held to their gates and to BASELINE. With MODEL, PRECISION or another
# variable of the engine after it: that one bundle, judged again by a fresh process without torch. One
# that happens to be in the environment must not keep a CI job from its baseline.
ONE_BUNDLE := $(filter command,$(foreach name,MODEL PRECISION WEIGHTS CALIB TARGET \
	BACKEND BATCH IMAGE_SIZE OUT ARGS,$(origin $(name))))
ifneq ($(ONE_BUNDLE),)
parity: engine
	@$(BIN)/repvgg-export verify $(call quoted,$(BUNDLE))
else
parity: $(READY)
	@$(BIN)/repvgg-export parity $(call quoted,$(CONFIG)) $(call option,--baseline,$(BASELINE))
endif

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 2 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Known vulnerabilities of everything that constraints.txt pins. Where the service cannot be reached
# it says so and passes.
audit: $(READY)
	$(BIN)/python .ci/audit.py constraints.txt

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(READY)
	$(BIN)/python benchmarks/export_time.py
	$(BIN)/python benchmarks/int8_quality.py
	$(BIN)/python benchmarks/calibration_cost.py

# Train form, deploy form, VGG-16 and ResNet-50 side by side, as docs/paper.md.
benchmark-paper: $(READY)
	$(BIN)/python benchmarks/paper.py

# From checkpoint and images to INT8, beside the peers' whole road, as docs/speed.md.
benchmark-pipeline: $(READY)
	$(BIN)/python benchmarks/pipeline.py

# Every precision and target that TensorRT-RTX builds here, as docs/engines.md.
engine-table: $(READY)
	$(BIN)/python benchmarks/engine_table.py

# Ten minutes of wrong files for every command that reads one; docs/reliability.md.
fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz.py $(ARGS)

# The documentation as a site, in build/site; a broken link or anchor fails it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# On a machine with a GPU: everything that nobody can run elsewhere, into one JSON file.
gpu-test: $(VENV)/.with-cuda
	$(BIN)/python benchmarks/gpu_test.py $(ARGS)

clean:
	rm -rf build dist $(VENV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[export,rtx,sign,cluster,dev,docs]'
	@touch $@

$(VENV)/.with-cuda: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[cuda]'
	@touch $@
