# make demo   the four stages on the sentiment task, on the CPU, with a model that comes along (about 10 minutes)
# make test   the tests                                make lint   ruff
# Needs Python 3.11 or newer (PYTHON=python3.12 chooses one) and nothing else; all goes into .venv.

PYTHON ?= python3
RUN = . .venv/bin/activate &&
TASK = sentiment

demo: .venv/ready
	$(RUN) python generate.py --task $(TASK)
	$(RUN) python score.py --task $(TASK)
	$(RUN) python train.py --task $(TASK)
	$(RUN) python eval.py --task $(TASK) --models smollm2 runs/$(TASK)/rdpo

test: .venv/ready
	$(RUN) python -m pytest

lint: .venv/ready
	$(RUN) ruff check . && ruff format --check .

# torch first and by its exact version, so that nothing else pulls in another build of it
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, e.g. make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache

.PHONY: demo test lint clean
