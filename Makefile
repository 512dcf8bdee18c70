# make demo and make test set everything up that they need.
export PYTHON ?= python3
RUN ?= runs/demo
.PHONY: demo test lint types tests test-heavy promises soak timm-tests docs setup system

setup:
	@bash tools/setup.sh

demo: setup
	@bash tools/demo.sh "$(RUN)"

test: lint types tests

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

types: setup
	.venv/bin/mypy

system:
	@bash tools/system.sh g++:g++ $(if $(CHROMIUM),,chromium:chromium)

# Other runtimes (OpenVINO, ONNX Runtime, Ray, a browser's driver) in processes of their own: a worker that had loaded them all died
# twice, without a word, in a test long after.
RUNTIMES = tests/speed tests/export tests/serve tests/explain tests/test_many.py tests/test_hub.py
PYTEST = OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal -m "not heavy"

tests: setup system
	$(PYTEST) $(RUNTIMES)
	$(PYTEST) $(RUNTIMES:%=--ignore=%)

test-heavy: setup system
	.venv/bin/pytest -m heavy $(RUNTIMES)
	.venv/bin/pytest -m heavy $(RUNTIMES:%=--ignore=%)

promises: setup
	DYNAMIXER_PROMISES=long .venv/bin/pytest -v tests/training/test_promises.py tests/training/test_engine.py

soak: setup
	DYNAMIXER_PROMISES=long .venv/bin/pytest -s -v tests/serve/test_promises.py

timm-tests: setup
	.venv/bin/python tools/timm_tests.py

docs: setup
	.venv/bin/python -m sphinx -W -n --keep-going -d build/doctrees docs build/site
