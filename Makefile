# Everything runs from .venv, which each target makes and fills for itself. Needs Python 3.11 or later, pip, make and git.

PYTHON ?= python3
BIN := .venv/bin
# torch is pinned in constraints.txt and nowhere else; pip without that pin takes a 5 GB CUDA stack.
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
TARGET_TESTS := .venv-targets/bin/python -m pytest -p no:anyio tests/targets -k "executorch or litert"

.PHONY: help demo demo-lite0 data test test-targets quick check lint format bench bench-quantization coverage coverage-peers coverage-speed prune-quantize docs clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.installed-demo  ## compress a Fashion-MNIST network, print the figures (DATA=folder: use your own copy of the data)
	$(BIN)/python -m examples.fashion_mnist.demo $(if $(DATA),--data "$(DATA)")

demo-lite0: .venv/.installed-demo  ## compress EfficientNet-Lite0 with its ImageNet weights, calibrated on unlabelled photos
	$(BIN)/python -m examples.efficientnet_lite0.demo

data: .venv/.installed-dev  ## fetch the data that tests and examples read
	$(BIN)/python -c 'from examples.fashion_mnist.data import load; load("test")'

# Both run whatever the first says, so that one run shows all that is wrong.
test: .venv/.installed-dev .venv-targets/.installed  ## run every test, each target in an environment that has it (under 40 minutes on 2 cores)
	@failed=0; $(TARGET_TESTS) || failed=1; $(BIN)/python -m pytest || failed=1; exit $$failed

quick: .venv/.installed-dev  ## run the quick tests (under 5 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow" -n 2

test-targets: .venv-targets/.installed  ## run the tests of ExecuTorch and LiteRT, in an environment that has them
	$(TARGET_TESTS)

check: lint test  ## lint, types, import layers, then every test

lint: .venv/.installed-dev  ## the part of check that runs no test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev  ## put the code into the common layout
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.installed-dev  ## measure what benchmarks/ measures
	$(BIN)/python -m benchmarks

bench-quantization: .venv-rivals/.installed  ## int8 here beside other libraries: accuracy, latency, size, time, memory
	.venv-rivals/bin/python -m benchmarks.quantization
	.venv-rivals/bin/python -m benchmarks.kernel_audit

coverage: .venv-coverage/.installed  ## prune every model family of timm, torchvision and transformers (hours; rows already there are kept)
	.venv-coverage/bin/python -m benchmarks.coverage
	.venv-coverage/bin/python -m benchmarks.coverage.table

coverage-peers: .venv-peers/.installed  ## the same models with torch-pruning and torch-kirigami (hours)
	for library in torch-pruning torch-pruning-heads torch-kirigami; do .venv-peers/bin/python -m benchmarks.coverage --library $$library; done

prune-quantize: .venv-coverage/.installed  ## prune, then quantize a sample of the zoo, save, reload, compare (an hour; rows already there are kept)
	.venv-coverage/bin/python -m benchmarks.prune_quantize
	.venv-coverage/bin/python -m benchmarks.prune_quantize.table

coverage-speed: .venv-peers/.installed  ## how the analysis grows, and ResNet-50 beside torch-pruning
	.venv-peers/bin/python -m benchmarks.analysis_speed

# A fresh environment each time: the reference comes from the code, which Sphinx does not see change.
docs: .venv/.installed-docs  ## build the documentation into site/
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -b html docs site
	@echo "site/index.html"

clean:  ## remove everything that can be made again, .venv included
	rm -rf .venv .venv-coverage .venv-peers .venv-targets .venv-rivals site build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install is taken up again.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed-demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing jettison and the CPU build of torch into .venv (about a minute)"
	$(INSTALL) --editable '.[images]'
	@touch $@

.venv/.installed-dev: .venv/.installed-demo
	@echo "Installing the development tools into .venv"
	$(INSTALL) --editable '.[images,dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed-dev
	@echo "Installing Sphinx into .venv"
	$(INSTALL) --editable '.[images,dev,docs]'
	@touch $@

.venv-coverage/.installed: pyproject.toml benchmarks/coverage/constraints.txt
	$(PYTHON) -m venv .venv-coverage
	@echo "Installing torch, torchvision, timm and transformers into .venv-coverage (6 GB)"
	.venv-coverage/bin/python -m pip install --quiet --constraint benchmarks/coverage/constraints.txt --editable '.[timm,torchvision]' transformers
	@touch $@

# ExecuTorch and LiteRT hold other packages back, and their wheels are large: not in .venv.
.venv-targets/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-targets
	@echo "Installing ExecuTorch and LiteRT beside torch into .venv-targets (3 GB)"
	.venv-targets/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[images,dev,executorch,litert]'
	@touch $@

.venv-rivals/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-rivals
	@echo "Installing the other quantizers into .venv-rivals (3 GB)"
	.venv-rivals/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[images,dev,timm,executorch,litert]' nncf ai-edge-quantizer
	@touch $@

.venv-peers/.installed: pyproject.toml benchmarks/coverage/constraints.txt
	$(PYTHON) -m venv .venv-peers
	@echo "Installing torch, torchvision and the other libraries into .venv-peers (6 GB)"
	.venv-peers/bin/python -m pip install --quiet --constraint benchmarks/coverage/constraints.txt --editable '.[timm,torchvision]' transformers torch-pruning torch-kirigami matplotlib
	@touch $@
