# The one list of tasks; `make help` prints it. Each does its own set-up.

PYTHON ?= python3
export PYTHON
BIN := .venv/bin
IMAGE := build/protos.binpb
UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(UPGRADE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev demo up check lint types imports lint-protos proto-check \
	check-envoy check-settings check-image test test-servers fmt proto settings release-protos lock upgrade bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- running -----------------------------------------------------------------------

setup: ## make .venv with all that the mesh needs, servers included
	@tools/setup.sh runtime

setup-dev: ## the same, and what checks and tests need
	@tools/setup.sh dev

demo: setup ## run the whole mesh, place 20 orders, show their way, stop
	@$(BIN)/meshctl demo

up: setup ## run the whole mesh until Ctrl-C
	@exec $(BIN)/meshctl up

bench: setup-dev ## measure orders per second and CPU per order, into bench/results/
	@$(BIN)/python -m bench

# ---- checking ----------------------------------------------------------------------

check: proto-check lint-protos lint types imports check-envoy check-settings ## all of the checks below
	@echo "All checks passed."

lint: setup-dev ## Python: lint and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "run \`make fmt\`" >&2; $(BIN)/ruff format --check .; exit 1; }

types: setup-dev ## Python: types, strictly
	@$(BIN)/mypy .
	@cd envoy && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache/envoy *.py

imports: setup-dev ## Python: who may import whom (.importlinter)
	@out=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }

$(IMAGE): setup-dev FORCE
	@$(BIN)/python tools/protos.py image $@
FORCE:

lint-protos: $(IMAGE) ## protos: lint, format, and nothing that breaks the last release
	@$(BIN)/buf lint $(IMAGE) --path ordermesh
	@$(BIN)/buf format protos --diff --exit-code
	@$(BIN)/buf breaking $(IMAGE) --path ordermesh --against protos/released.binpb

proto-check: setup-dev ## protos: generated/ is what they say
	@$(BIN)/python tools/protos.py check

check-envoy: setup-dev ## Envoy accepts every rendering of its configuration
	@$(BIN)/python envoy/render.py --validate-all

check-settings: setup-dev ## docs/settings.md is what the settings classes say
	@$(BIN)/python -m tools.settings_table --check docs/settings.md

check-image: ## build the container image without an engine (root, Debian, five minutes)
	@deploy/check_image.sh

test-servers: ## install the servers that tests need and no wheel holds (RabbitMQ, curl)
	@tools/install_test_servers.sh

test: setup-dev test-servers ## run the tests
	@$(BIN)/pytest $(TESTS)

# ---- writing -----------------------------------------------------------------------

fmt: setup-dev ## format Python and protos, fix what can be fixed
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write protos

proto: setup-dev ## write generated/ from protos/
	@$(BIN)/python tools/protos.py generate

settings: setup-dev ## write docs/settings.md from the settings classes
	@$(BIN)/python -m tools.settings_table docs/settings.md

release-protos: proto-check ## with a release: make today's protos what later ones must not break
	@cp generated/ordermesh.binpb protos/released.binpb

lock: setup ## write the locks after a change in pyproject.toml, keeping versions
	@$(UV_COMPILE) --group build pyproject.toml --output-file requirements.lock
	@$(UV_COMPILE) --group build --group dev --constraint requirements.lock pyproject.toml \
		--output-file requirements-dev.lock
	@echo 'uv' | $(UV_COMPILE) - --output-file requirements-uv.lock

upgrade: ## write the locks with the newest versions
	@$(MAKE) --no-print-directory lock UPGRADE=--upgrade

clean: ## remove what was built, and .venv
	@rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
