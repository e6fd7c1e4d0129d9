# Two commands matter: `make demo` and `make test`. Both set everything up on a fresh machine (Python 3.10+) and can be
# run again at once: the environment, the models and the prepared data are cached.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/demo
# Folder with the real domains (beauty/ ...), for the results grids and the stage-1 benchmark.
DATA ?= data
# Minutes after which a results grid stops; it goes on when the command is given again.
BUDGET ?= 600
# Runs of a grid at a time; they share the threads.
JOBS ?= 1
# The grids of `make results`. full_data.yaml tunes an LLM on 20,000 samples a domain: for GPUs, given by name.
GRIDS ?= $(filter-out %/full_data.yaml,$(wildcard configs/results/*.yaml))

.PHONY: help demo test lint setup bench results clean

help:
	@echo "make demo   set up and run the main job end to end on real data; prints the path of the report"
	@echo "make test   set up and run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the benchmarks; writes benchmarks/results/ (DATA=folder of real domains)"
	@echo "make results  the results grids (DATA=folder of real domains, BUDGET=minutes a grid, JOBS=runs at a time); can be stopped and given again"
	@echo "make clean  remove the environment and the build products (not the caches of models and data)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): about 2.1 GB once unpacked, 1 to 5 minutes; done once."
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is %d.%d: set PYTHON=python3.x" % sys.version_info[:2]'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@echo "The demo fetches two small models and MovieLens-100K once (about 180 MB), then works for about 10 minutes on 2 cores (16 CPU-minutes); on a CPU without bf16 instructions an hour or more."
	@$(BIN)/lightning-sfubm fit --config configs/experiment/demo.yaml --trainer.default_root_dir $(RUN_DIR)

# Flower takes a task for dead that gives no sign of life for 30 seconds; its processes have the cores to themselves.
FLOWER := tests/federated/test_flower.py
test: $(STAMP)
	@echo "Running the tests, a process for each core up to four, and those of Flower after them: 20 to 40 minutes on 2 cores; small models and an environment for Flower are fetched once."
	@$(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder --ignore $(FLOWER)
	@$(BIN)/python -m pytest $(FLOWER)

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(STAMP)
	@test -d "$(DATA)/beauty" || { echo "$(DATA)/beauty is missing: give the folder of the real domains as DATA=DIR"; exit 1; }
	@echo "The benchmarks take about 45 minutes on an idle machine of 2 cores and write benchmarks/results/; those against peers are in benchmarks/peers/README.md."
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loop.py --config configs/experiment/demo.yaml
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/federated.py --only clients participants workers secure epsilon
	OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 $(BIN)/python benchmarks/federated.py --only knn_mix kmeans
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/llm.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/stage1.py --data-root $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/catalogue.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/text.py --data-root $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tuning.py --data-root $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/activations.py --data-root $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/summary.py

results: $(STAMP)
	@status=0; for grid in $(GRIDS); do \
		$(BIN)/lightning-sfubm results --grid $$grid --root $(DATA) --budget $(BUDGET) --jobs $(JOBS) --publish docs/results/$$(basename $$grid .yaml) || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info
