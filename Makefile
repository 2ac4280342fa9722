# make demo | make test | make check - each makes the environment (.venv) first, once.
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow fuzz chaos compose-test check format clean environment \
	bench-alignment bench-saml bench-aggregation bench-large bench-quality bench-service bench-waiting

BIN := .venv/bin
STAMP := .venv/.installed

help:
	@echo "make demo                            co-tune an LLM and three small models on this machine"
	@echo "make demo DATA=<folder> DOMAINS=a,b  the same on your own data"
	@echo "make test                            run the tests (make test-slow: those that take minutes); WORKERS=0: one process"
	@echo "make fuzz                            schemathesis on every operation of the API (COTUNE_FUZZ_CASES=60)"
	@echo "make chaos                           kills, cuts, replays, a full disk, spoilt uploads (CHAOS_ARGS=\"--seed 2\")"
	@echo "make compose-test                    docker-compose.yml for real: upgrade, a demo in it, kills, backup and restore"
	@echo "make check                           ruff, mypy, import-linter"
	@echo "make bench-alignment, bench-saml, bench-aggregation   speed, memory and bytes of the method (benchmarks/)"
	@echo "make bench-large                     models of real size on a graphics card; says what it needs where there is none"
	@echo "make bench-quality PRESET=tiny DATA=<folder>   co_plms against other strategies and controls, into docs/results"
	@echo "make bench-quality PRESET=facts       the same on the project's own questions, without a data folder"
	@echo "make bench-service, bench-waiting    uploads and whole rounds, against a bare server and Flower; 10,000 devices that wait"
	@echo "make clean                           remove .venv and every cache in this folder"

# make demo ROUNDS=5, OUT=<file>, KEEP=1: as in `cotune demo --help`.
demo: $(STAMP)
	@exec $(BIN)/cotune demo $(if $(DATA),--data "$(DATA)") $(if $(DOMAINS),--domains "$(DOMAINS)") \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(OUT),--out "$(OUT)") $(if $(KEEP),--keep)

# So many processes share the test files (tests/distribution.py); 0: all in one, as `pytest` by itself does. Each needs
# the memory for torch, and many tests start processes of their own.
WORKERS ?= 2

test: $(STAMP)
	$(BIN)/pytest -m "not slow" -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

fuzz: $(STAMP)
	$(BIN)/pytest -m slow tests/cloud_api/test_fuzz.py $(PYTEST_ARGS)

# Docker with compose, or Podman with podman-compose; without either it says so and is skipped.
compose-test:
	@python3 scripts/compose_test.py

# Own PostgreSQL, Redis and processes on free ports; nothing of the machine's is touched. Ends by itself.
chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos $(CHAOS_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# BENCH_ARGS="--repeats 5"; one thread, so that ratios do not depend on the machine's cores.
bench-alignment bench-saml bench-aggregation bench-waiting: bench-%: $(STAMP) .venv/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.$* $(BENCH_ARGS)

# ROUNDS_ARGS="--turns 5 --memory"; nothing of Flower is left running.
bench-service: $(STAMP) .venv-flower/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.service $(BENCH_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rounds $(ROUNDS_ARGS)

# Its own environment: Flower wants older versions of typer, rich, uvicorn, fastapi and others than ours.
.venv-flower/.installed: benchmarks/flower_app/requirements.txt $(STAMP)
	$(BIN)/python -m venv --clear .venv-flower
	.venv-flower/bin/pip install --quiet --no-deps --requirement $< $(PIP_ARGS)
	@touch $@

# As many threads as PyTorch likes: the card does the work.
bench-large: $(STAMP) .venv/.bench
	$(BIN)/python -m benchmarks.large_models $(BENCH_ARGS)

# PRESET=tiny|small|medium|facts; one process a core, each with the threads of the experiment. An interrupted one goes on.
PRESET ?= tiny
bench-quality: $(STAMP) .venv/.bench
	@exec $(BIN)/python -m benchmarks.quality "$(PRESET)" $(if $(DATA),--data "$(DATA)") $(BENCH_ARGS)

.venv/.bench: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]' $(PIP_ARGS)
	@touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

environment: $(STAMP)

# PYTHON=<program> chooses the Python, PIP_ARGS="..." adds to pip's command line (an index, for instance).
$(STAMP): pyproject.toml constraints.txt scripts/make_environment.sh
	@PYTHON="$(PYTHON)" sh scripts/make_environment.sh .venv $(PIP_ARGS)
	@touch $@

clean:
	rm -rf .venv .venv-flower .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache build dist
	find services tests migrations -name __pycache__ -prune -exec rm -rf {} +
	rm -rf services/*.egg-info
