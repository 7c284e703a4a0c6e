# make demo: the whole way on UCI digits, in minutes       make demo-pruned: the same, dense and pruned
# make test: all tests       make lint: the linter       make soak: 200 kills, 300 epochs, 20,000 changed files
# make networks: what works, of torchvision's and timm's networks and odd ones, in hours; `FLAGS=--resume` goes on
# make mutants: which changed lines no test notices, in hours     make bench: times of training, of the search and of packed networks
# make check-gpu: what no test sees without a GPU, on one, in at most 4 minutes
# make record: measure anew what README.md and docs/ show, on a quiet machine after make clean, but for what takes hours
# make sync: copy what the stages share     make clean: remove all results
# make experiments: does the method work, on Fashion-MNIST, in hours       make experiments-quick: a small version in minutes
# The virtual environment is made on first use, and made anew whenever a requirements file changes.

PYTHON ?= python3
HASH := $(shell cat requirements.txt requirements-dev.txt | $(PYTHON) -c "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest()[:12])")
VENV ?= $(HOME)/.cache/limpqp/venv-$(HASH)
READY := $(VENV)/.installed-$(HASH)
RUN := $(abspath $(VENV))/bin/python
STAGES := indicators_pretraining quantization_search quantization_training
MASTER := indicators_pretraining
LAYERS := util model sparsity quan engine
SEARCH_UTIL := __init__.py command.py errors.py config.py exchange.py figures.py tables.py

.PHONY: demo demo-pruned experiments experiments-quick test soak networks mutants lint bench check-gpu record sync clean environment
.DELETE_ON_ERROR:

environment: $(READY)

# The hash in its name says whether it fits the requirements; times of files, new in every clone, do not.
$(READY):
	@if [ -e "$(VENV)" ] && [ ! -e "$(VENV)/pyvenv.cfg" ] && [ -n "$$(ls -A "$(VENV)")" ]; then \
		echo "VENV: $(VENV) holds something else than a virtual environment; it would be emptied" >&2; exit 2; fi
	@echo "making the virtual environment $(VENV); the first time this takes minutes"
	$(PYTHON) -m venv --clear "$(VENV)"
	"$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch "$(READY)"

demo: $(READY)
	$(RUN) demo.py

demo-pruned: $(READY)
	$(RUN) demo.py --pruned

experiments: $(READY)
	cd experiments && $(RUN) run.py *.yaml

experiments-quick: $(READY)
	cd experiments && $(RUN) run.py *.yaml --quick

# Processes on all cores, of one thread each: the tests compute little, and threads that wait for each other on busy cores
# cost far more. Each folder has processes of its own, since stages have modules of the same names.
test: $(READY)
	@set -e; export OMP_NUM_THREADS=1; for folder in $(STAGES) experiments .; do \
		echo "== tests of $$folder"; (cd $$folder && $(RUN) -m pytest -q -n auto --maxprocesses=8 --dist=loadgroup tests); done

soak: $(READY)
	@set -e; export OMP_NUM_THREADS=1; \
	echo "== one run of each command, killed 200 times in all"; \
	LIMPQP_KILLS=200 $(RUN) -m pytest -q -s tests/test_kills.py; \
	echo "== 300 epochs, continued again and again"; \
	(cd $(MASTER) && LIMPQP_EPOCHS=300 $(RUN) -m pytest -q tests/test_endurance.py); \
	for folder in $(STAGES); do \
		echo "== 20,000 changed inputs: the share of $$folder"; \
		(cd $$folder && LIMPQP_FUZZ=20000 $(RUN) -m pytest -q tests/test_fuzz.py); done

# Without timm, the rest is tried.
networks: $(READY)
	-$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-networks.txt
	$(RUN) tests/networks.py $(FLAGS)

mutants: $(READY)
	$(RUN) tests/mutants.py

lint: $(READY)
	$(RUN) -m ruff check .

bench: $(READY)
	cd $(MASTER) && $(RUN) ../measurements/bench_training.py
	cd quantization_search && $(RUN) ../measurements/bench_search.py
	cd quantization_training && $(RUN) ../measurements/bench_inference.py

check-gpu: $(READY)
	$(RUN) tests/check_gpu.py

record: $(READY)
	$(RUN) demo.py --record
	$(RUN) demo.py --pruned --record
	LIMPQP_RECORD=1 $(RUN) -m pytest -q tests/test_own_network.py
	cd $(MASTER) && $(RUN) ../measurements/bench_training.py --output ../measurements/bench_training_2_cores.csv
	cd quantization_search && $(RUN) ../measurements/bench_search.py --output ../measurements/bench_search_2_cores.csv
	cd $(MASTER) && $(RUN) ../measurements/bench_loader.py
	cd $(MASTER) && $(RUN) ../measurements/bench_ranks.py
	cd quantization_training && $(RUN) ../measurements/bench_inference.py --output ../measurements/bench_inference.csv
	cd quantization_training && $(RUN) ../measurements/bench_onnx.py
	cd quantization_training && $(RUN) ../measurements/bench_onnx.py --products
	$(RUN) -m measurements.pages

sync:
	cd quantization_training && rm -rf $(LAYERS)
	rm -rf quantization_search/models quantization_search/util
	find $(MASTER) -name __pycache__ -prune -exec rm -rf {} +
	cd $(MASTER) && cp -r $(LAYERS) ../quantization_training/
	cp -r $(MASTER)/model quantization_search/models
	rm quantization_search/models/training_pass.py
	mkdir quantization_search/util
	cp $(MASTER)/tests/fuzzing.py quantization_search/tests/
	cd $(MASTER)/tests && cp fuzzing.py comparing.py shipped.py small_networks.py ../../quantization_training/tests/
	cd $(MASTER)/tests && cp comparing.py small_networks.py ../../tests/
	cd $(MASTER)/util && cp $(SEARCH_UTIL) ../../quantization_search/util/

clean:
	rm -rf $(addsuffix /results,$(STAGES) experiments)
