# The two commands, demo and test, need Python 3.11+ and a package registry; everything they make lies in .host/.
PYTHON ?= python3
IN_HOST := $(PYTHON) tests/host/environment.py
ARGS ?=

.PHONY: demo test lint clean

# One picture from GGUF files in the real ComfyUI.
demo:
	$(IN_HOST) -m host.demo $(ARGS)

# The whole suite, in two processes of one thread each; ARGS goes to pytest: make test ARGS="-k formats -x"
test: export OMP_NUM_THREADS = 1
test:
	$(IN_HOST) -m pytest -n 2 --dist loadfile $(ARGS)

lint:
	$(IN_HOST) -m ruff check .
	$(IN_HOST) -m ruff format --check .

clean:
	rm -rf .host
