# Every command a person or CI needs. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8080
DATA ?=
USER_ID ?=
.DEFAULT_GOAL := help
.PHONY: help install run ui backfill serve score-all simulate-month keys deploy rollback forget export data-map audit features explain training-set vacuum mend-lake test prove check bench-features bench-ranker bench-serving bench-loop bench-gpu openapi format pictures clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## create the virtual environment with every dependency at its pinned version

# torch goes first: alone it takes the CPU build where one is offered, and nothing after it pulls another.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV), a few minutes the first time: PyTorch …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 2> >(grep -v 'is ignored: it is neither' >&2)
	@echo "  … and everything else, 3.7 GB in the end"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2> >(grep -v 'is ignored: it is neither' >&2)
	@touch $@

run: install ## the whole road, events to recommendations: [DATA=folder or s3://prefix] [USER_ID=…] [RETRAIN=1] [SHIFT=1]
	@$(BIN)/python -m orchestration.run $(if $(DATA),--data '$(DATA)') $(if $(USER_ID),--user '$(USER_ID)') $(if $(RETRAIN),--retrain) $(if $(SHIFT),--shift)

ui: install ## the Dagster UI with its daemon on the current deployment [UI_PORT=3000]
	@$(BIN)/python -m infra.ui --port $(or $(UI_PORT),3000)

# RESUME=1 and CANCEL=1 mean the last backfill; their value may also be the id that a backfill prints.
backfill: install ## materialise days again in the instance of `make ui`: VIEW=a,b FROM=day TO=day [ONLY=missing|failed|stale] [DRY_RUN=1], or RESUME=1, CANCEL=1
	@$(BIN)/python -m orchestration.backfill $(if $(VIEW),--view '$(VIEW)') $(if $(FROM),--from '$(FROM)') $(if $(TO),--to '$(TO)') $(if $(ONLY),--only '$(ONLY)') $(if $(DRY_RUN),--dry-run) $(if $(RESUME),--resume '$(RESUME)') $(if $(CANCEL),--cancel '$(CANCEL)') $(if $(URL),--url '$(URL)')

serve: install ## answer over HTTP on this machine [PORT=8080]
	@$(BIN)/python -m infra.serve --port $(PORT)

score-all: install ## everybody's list scored ahead, for requests that find no model; goes on where it was stopped: [VERSION=…] [RESTART=1] [PER_USER=50] [CANDIDATES=200]
	@$(BIN)/python -m orchestration.score_all $(if $(VERSION),--version '$(VERSION)') $(if $(RESTART),--restart) $(if $(PER_USER),--per-user '$(PER_USER)') $(if $(CANDIDATES),--candidates '$(CANDIDATES)')

simulate-month: install ## a simulated month of the whole loop in minutes, in a deployment of its own, and a page that tells of it: [DAYS=30] [SEED=7] [OUT=folder]
	@$(BIN)/python -m orchestration.simulate_month $(if $(DAYS),--days '$(DAYS)') $(if $(SEED),--seed '$(SEED)') $(if $(OUT),--out '$(OUT)')

keys: install ## request keys: lists them; NAME=… makes one, shown once [SCOPES=recommend,write] [PER_MINUTE=6000] [DAYS=…]; REVOKE=id
	@$(BIN)/python -m infra.keys $(if $(NAME),create --name '$(NAME)' $(if $(SCOPES),--scopes '$(SCOPES)') $(if $(PER_MINUTE),--per-minute '$(PER_MINUTE)') $(if $(DAYS),--days '$(DAYS)'),$(if $(REVOKE),revoke '$(REVOKE)',list))

deploy: install ## the released model and its function to a cloud, safe to repeat: [PLAN=1: only say what would change] [TARGET=aws|cloud-run]
	@$(BIN)/python -m infra.deploy deploy $(if $(TARGET),--target '$(TARGET)') $(if $(PLAN),--plan)

rollback: install ## let the model before serve again [VERSION=…], or the function's version before: WHAT=function [TARGET=aws|cloud-run]
	@$(BIN)/python -m infra.deploy rollback $(if $(WHAT),--what '$(WHAT)') $(if $(VERSION),--version '$(VERSION)') $(if $(TARGET),--target '$(TARGET)')

forget: install ## erase a person: USER_ID=… [YES=1: do not ask] [REQUEST=1: only ask Dagster to] or RESUME=1
	@$(BIN)/python -m orchestration.forget $(if $(USER_ID),--user '$(USER_ID)') $(if $(RESUME),--resume) $(if $(YES),--yes) $(if $(REQUEST),--request)

export: install ## all that is held of a person, as JSON: USER_ID=… [OUT=file] [REQUEST=1: only ask Dagster to]
	@$(BIN)/python -m orchestration.export_person $(if $(USER_ID),--user '$(USER_ID)') $(if $(OUT),--out '$(OUT)') $(if $(REQUEST),--request)

data-map: install ## write docs/data-map.md: what personal data lies where, why, how long, who may read it
	@$(BIN)/python -m infra.data_map

audit: install ## model card, data map, reports, rights, receipts in one folder that can be checked: [OUT=folder] [VERIFY=folder]
	@$(BIN)/python -m infra.audit $(if $(OUT),--out '$(OUT)') $(if $(VERIFY),--verify '$(VERIFY)')

features: install ## features of a person or an item with status and age: VIEW=a,b KEY=… [AT=instant]
	@$(BIN)/python -m orchestration.features $(if $(VIEW),--view '$(VIEW)') $(if $(KEY),--key '$(KEY)') $(if $(AT),--at '$(AT)')

explain: install ## which rows made a person's or an item's features: VIEW=… KEY=… [AT=instant]
	@$(BIN)/python -m orchestration.explain $(if $(VIEW),--view '$(VIEW)') $(if $(KEY),--key '$(KEY)') $(if $(AT),--at '$(AT)')

vacuum: install ## delete the files that killed runs left in the lake: [HOURS=24] [DRY_RUN=1]
	@$(BIN)/python -m orchestration.vacuum $(if $(HOURS),--hours '$(HOURS)') $(if $(DRY_RUN),--dry-run)

mend-lake: install ## put days aside whose file in the lake is missing or damaged, so that they are loaded again: [DRY_RUN=1]
	@$(BIN)/python -m orchestration.mend $(if $(DRY_RUN),--dry-run)

training-set: install ## features for a table of labels, as known at each: LABELS=file.parquet OUT=file.parquet [VIEWS=a,b] [TIME=column] [KNOWN_AT=0]
	@$(BIN)/python -m orchestration.training_set $(if $(LABELS),--labels '$(LABELS)') $(if $(OUT),--out '$(OUT)') $(if $(VIEWS),--views '$(VIEWS)') $(if $(TIME),--time '$(TIME)') $(if $(filter 0,$(KNOWN_AT)),--no-known-at)

test: install ## everything CI runs, in as many processes as there are cores, four at most
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

prove: install ## the long proofs, in full
	@$(BIN)/python -m pytest -m prove

check: install ## format, lint, types, import contracts, Dagster definitions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@VIRTUAL_ENV=$(abspath $(VENV)) LARDER_HOME=$(abspath $(VENV))/no-deployment $(BIN)/dg check defs

bench-features: install ## reads, loads, backfill and training sets, measured; PEERS=1 measures Feast beside; [QUICK=1] [ONLY=section,…]; writes tests/benchmarks/results/
	@$(BIN)/python -W ignore -m tests.benchmarks.bench_features $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') $(if $(filter 1,$(PEERS)),--peers)

bench-ranker: install ## quality, size and speed of the ranker, measured; PEERS=1 measures RecTools beside; [QUICK=1] [ONLY=section,…] [WORK=folder: keep and go on]; writes tests/benchmarks/results/
	@$(BIN)/python -W ignore -m tests.benchmarks.bench_ranker $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') $(if $(WORK),--work '$(WORK)') $(if $(filter 1,$(PEERS)),--peers)

bench-serving: install ## the function's latency, load, start, size and telemetry, measured on 100,000 items: [QUICK=1] [ONLY=section,…] [WORK=folder: keep and go on]; writes tests/benchmarks/results/
	@$(BIN)/python -W ignore -m tests.benchmarks.bench_serving $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') $(if $(WORK),--work '$(WORK)')

bench-loop: install ## experiments, drift, explanations and the page, proven on worlds whose truth is known; [QUICK=1] [ONLY=section,…] [WORK=folder: keep and go on]
	@$(BIN)/python -W ignore -m tests.benchmarks.bench_loop $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') $(if $(WORK),--work '$(WORK)')

bench-gpu: install ## the ranker on an NVIDIA GPU against PyTorch and the card's ceilings; writes tests/benchmarks/results/
	@$(BIN)/python -W ignore -m tests.benchmarks.bench_gpu

openapi: install ## write docs/openapi.json from the models that read requests and write answers
	@$(BIN)/python -m inference.openapi

format: install ## format the code and apply safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

pictures: install ## take the README's pictures again from the current deployment (needs chromium)
	@$(BIN)/python -m infra.pictures
	@$(BIN)/python -m infra.page_pictures

clean: ## remove the virtual environment and caches; deployments in .larder stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
