# Personae's commands. `make help` lists them; CI runs the same ones.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
VENV_PROTO := .venv-proto
BIN := $(VENV)/bin
PROTOS := $(wildcard protos/personae/v1/*.proto)
# Stubs for the server alone: callers do not get them.
SERVER_PROTOS := protos/service/rpc/envoy/ext_authz.proto
# By the module: the scripts in $(BIN) name the directory that they were made in.
ALEMBIC := $(BIN)/python -m alembic
WITH_DATABASE := $(BIN)/python -m service with-database
PIP_INSTALL := install --no-user --quiet --disable-pip-version-check --require-hashes

# What would lead Python and pip elsewhere than into $(VENV).
unexport PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONINSPECT VIRTUAL_ENV
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_NO_DEPS PIP_REQUIRE_VIRTUALENV

# ---- environment

.PHONY: help
help: ## List the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.installed ## Make the virtual environment and install what is pinned

$(VENV)/.installed: requirements/dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Personae needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Say PYTHON=… to choose another one.")'
	@echo "installing into $(VENV), once …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip $(PIP_INSTALL) -r requirements/dev.lock
	@touch $@

$(VENV_PROTO)/.installed: requirements/proto.lock
	@$(PYTHON) -m venv $(VENV_PROTO)
	@$(VENV_PROTO)/bin/python -m pip $(PIP_INSTALL) -r requirements/proto.lock
	@touch $@

.PHONY: lock
lock: setup ## Resolve the pinned versions anew, within the bounds of pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock' --extra server pyproject.toml --output-file requirements/server.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock' --extra server --extra dev pyproject.toml --constraints requirements/server.lock --output-file requirements/dev.lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock' requirements/proto.in --output-file requirements/proto.lock

# ---- running

.PHONY: run
run: setup ## Serve on 127.0.0.1:50051 with a database of its own, or on DATABASE_URL
	@exec $(BIN)/python -m service dev

.PHONY: dev-certs
dev-certs: setup ## Make a CA and certificates in .dev/certificates, to try TLS on this machine
	@exec $(BIN)/python -m service dev-certs

.PHONY: superuser
superuser: setup ## Create a superuser; asks for email, username and password
	@exec $(BIN)/python -m service create-superuser

.PHONY: db-test
db-test: setup ## Try the database and say what is wrong with it
	@exec $(WITH_DATABASE) $(BIN)/python -m service.db.test_db

# ---- migrations

.PHONY: migrate
migrate: setup ## Bring the database to the newest schema
	@$(BIN)/python -m service migrate

.PHONY: migrate-new
migrate-new: setup ## Write a migration from the difference between models and database: m="add a column"
	@test -n "$(m)" || { echo 'say what it does: make migrate-new m="add a column"'; exit 2; }
	@$(WITH_DATABASE) $(ALEMBIC) revision --autogenerate -m "$(m)"

.PHONY: migrate-down
migrate-down: setup ## Take the last migration back, or go down to a revision: to=0001
	@$(WITH_DATABASE) $(ALEMBIC) downgrade $(or $(to),-1)

.PHONY: migrate-history
migrate-history: setup ## List the migrations, and the one the database is at
	@$(WITH_DATABASE) $(ALEMBIC) history --verbose --indicate-current

.PHONY: migrate-check
migrate-check: setup ## Fail when models and database differ
	@$(WITH_DATABASE) $(ALEMBIC) check

.PHONY: migrate-sql
migrate-sql: setup ## Print the SQL of the migrations, without running it: from=0001
	@$(ALEMBIC) upgrade $(if $(from),$(from):)head --sql

# ---- quality

.PHONY: test
test: setup ## Run all tests, on a real PostgreSQL
	@$(BIN)/python -m pytest -n 3 --dist loadfile

.PHONY: test-fast
test-fast: setup ## Run the fast tests: unit and house
	@$(BIN)/python -m pytest tests/unit tests/house

.PHONY: lint
lint: setup lint-proto ## Check style, types, imports, protos, migrations, generated code and dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -c 'from importlinter.cli import lint_imports_command as lint; lint()' --no-cache
	@sql=$$(mktemp) && trap 'rm -f "$$sql"' EXIT && echo "$(ALEMBIC) upgrade head --sql, read by squawk" && \
		$(ALEMBIC) upgrade head --sql >"$$sql" && $(BIN)/squawk "$$sql"
	$(BIN)/python -m service.dev.vulnerabilities requirements/server.lock requirements/dev.lock requirements/proto.lock

.PHONY: lint-proto
lint-proto: setup $(VENV_PROTO)/.installed
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code --exclude-path protos/google
	@if git cat-file -e main:buf.yaml 2>/dev/null; then \
		echo "$(BIN)/buf breaking --against .git#branch=main"; $(BIN)/buf breaking --against '.git#branch=main'; \
	else echo "buf breaking: there is no branch main to compare with"; fi
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(MAKE) --no-print-directory generate into="$$fresh" && \
		diff -r -x __init__.py -x __pycache__ "$$fresh/personae/v1" personae/v1 && \
		diff -r -x __init__.py -x __pycache__ "$$fresh/service/rpc/envoy" service/rpc/envoy || \
		{ echo "the stubs are stale: run make proto and commit what it changes"; exit 1; }

.PHONY: fmt
fmt: setup ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w --exclude-path protos/google

.PHONY: types
types: setup ## Check the types only
	$(BIN)/python -m mypy

.PHONY: proto
proto: $(VENV_PROTO)/.installed ## Generate the stubs in personae/v1 and service/rpc/envoy
	@$(MAKE) --no-print-directory generate into=.

.PHONY: generate
generate: $(VENV_PROTO)/.installed
	@PATH="$$PWD/$(VENV_PROTO)/bin:$$PATH" $(VENV_PROTO)/bin/python -m grpc_tools.protoc -I protos \
		--python_out="$(into)" --grpc_python_out="$(into)" --mypy_out=quiet:"$(into)" --mypy_grpc_out=quiet:"$(into)" \
		$(PROTOS) $(SERVER_PROTOS)

.PHONY: bench
bench: setup ## Measure the figures that Personae promises, as ratios within one run
	@$(BIN)/python -m benchmarks

.PHONY: image
image: ## Build the container image
	docker build --tag personae .

.PHONY: clean
clean: ## Remove everything that is made, but not the development database
	rm -rf $(VENV) $(VENV_PROTO) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
