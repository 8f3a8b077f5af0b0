# make play, make test, make lint: each makes the environment it needs in .venv; what is there already is kept.
# make lightzero makes one of its own in .venv-lightzero: LightZero's packages do not go with ours. make transformers
# too, in .venv-transformers, and make ray in .venv-ray, so that the others stay small.
# Options go through ARGS: make play ARGS="--verify", make test ARGS="-k scopes".

PYTHON ?= python3
ARGS ?=
# In a terminal pip shows what it downloads, and how far it is; in a log its failures only.
PIP_INSTALL := -m pip install $(shell test -t 2 || echo -qq)
LARGE := torch is the largest: some 200 MB for a CPU, several GB where pip takes a build for CUDA
VENV := .venv
BIN := $(VENV)/bin
LIGHTZERO_VENV := .venv-lightzero
LIGHTZERO_RAY_TESTS := tests/test_lightzero_ray.py
LIGHTZERO_TESTS := tests/test_world_model_integration.py $(filter-out $(LIGHTZERO_RAY_TESTS),$(wildcard tests/test_lightzero_*.py))
TRANSFORMERS_VENV := .venv-transformers
FREETHREADED := .venv-freethreaded
DOCS_VENV := .venv-docs
RAY_VENV := .venv-ray
LIGHTZERO_MAIN_TESTS := $(wildcard tests/test_lightzero_main_*.py)

# A Prometheus that the tests of the dashboard ask: what .ci/prometheus finds, or fetches, if left out.
PROMETHEUS ?=

.PHONY: bench clean docs gpu help lightzero lightzero-main lightzero-ray lint metrics mutants play play-ray ray test text-tree
.PHONY: train-lightzero-ray transformers wheels
.DELETE_ON_ERROR:
# Two pips at once in one environment break it.
.NOTPARALLEL:

# What concurrent_kv/_native is built from, and $(call forget_module,PYTHON), which removes what was built for one
# interpreter: where a later build fails, the package must run without the module rather than with an old one.
BUILD := setup.py concurrent_kv/_native.c $(wildcard concurrent_kv/csrc/*.h)
forget_module = rm -f concurrent_kv/_native$$($(1) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')

help:
	@echo 'make play   play CartPole with a tree search over the cache   (ARGS="--verify --episodes 4", ARGS="--help")'
	@echo 'make test   run the tests                                     (ARGS="-k scopes")'
	@echo 'make stress attack the cache from threads and tasks           (ARGS="--profile all --faults all", ARGS="--help")'
	@echo 'make mutants  take guards out, and see which the tests miss    (ARGS="--sample 20", ARGS="--recorded", ARGS="--help")'
	@echo 'make gpu    the tests of streams and the benchmark on a GPU    (GPU_PYTHON=python3 takes its torch as it is)'
	@echo '           with LightZero there too, its recurrent step old against new'
	@echo 'make bench  the library beside what would be written instead  (ARGS="--quick", ARGS="--record NAME", ARGS="--help")'
	@echo 'make lint   ruff and mypy'
	@echo 'make test-threadsanitizer  races of the compiled module, without the GIL (builds an interpreter the first time)'
	@echo 'make lightzero  LightZero 0.2.0 on this cache: its world model, its training, old against new'
	@echo 'make lightzero-main  its main branch                     (LIGHTZERO=path/to/checkout)'
	@echo 'make lightzero-ray  its collectors in Ray actors, weights broadcast: the tests of that'
	@echo 'make train-lightzero-ray  train CartPole with them         (ARGS="--collectors 4 --rounds 50", ARGS="--help")'
	@echo 'make transformers  trees of text under Hugging Face transformers: the tests of that'
	@echo 'make text-tree  solve puzzles with a tiny language model, by search    (ARGS="--verify --picture tree.svg", ARGS="--help")'
	@echo 'make ray    searches on a cluster of processes, under Ray: the tests of that'
	@echo 'make play-ray  play CartPole with the searches in two Ray actors   (ARGS="--actors 4 --verify", ARGS="--help")'
	@echo 'make metrics  what is published, as Prometheus, Grafana, OpenTelemetry and TensorBoard have it'
	@echo 'make docs   build the documentation into site/, and open it in a headless browser'
	@echo 'make wheels  build the wheels, install and use each in an empty environment  (ARGS="--lowest --no-compiler")'
	@echo 'make clean  remove the environments and what tools left'

# What draws, what serves numbers, and the other event loop, are installed where they are asked for.
play: $(VENV)/$(if $(findstring --plot,$(ARGS))$(findstring --metrics,$(ARGS))$(findstring trio,$(ARGS)),play-all,play).stamp
	@$(BIN)/python -m examples.cartpole $(ARGS)

# A file of tests stays in one process. ARGS="-n 0": all in this one, as a debugger needs it.
IN_PROCESSES := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/test.stamp
	@$(BIN)/python -m pytest $(IN_PROCESSES) $(ARGS)

# The sdist, a wheel for each Python that is found here, and each of them used in an empty environment.
wheels: $(VENV)/package.stamp
	@$(BIN)/python release/wheels.py $(ARGS)

# The documentation as a site, in site/, opened in a headless browser.
docs: $(DOCS_VENV)/stamp
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build -q --clean --site-dir site
	@.ci/chromium
	@SITE=site $(DOCS_VENV)/bin/python -m pytest -q -p no:cacheprovider -o addopts=-ra --noconftest tests/test_docs_site.py $(ARGS)

# Half an hour to two: docs/mutants.md.
mutants: $(VENV)/test.stamp
	@PYTHONPATH=. $(BIN)/python -m tests.mutants $(ARGS)

# GPU_PYTHON: a Python that has a CUDA build of torch and what the tests import, instead of the environment of make test.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/test.stamp)
	@PYTHONPATH=. $(GPU_PYTHON) -m pytest -o addopts=-ra tests/gpu tests/test_gpu_programs.py \
	    tests/test_readme.py::test_a_program_about_streams_runs_on_a_gpu
	@PYTHONPATH=. $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# LightZero's rings are among the contestants where make lightzero has made their environment.
bench: $(VENV)/bench.stamp
	@$(BIN)/python -m benchmarks.peers $(ARGS)

# mypy reads the types of what the tests and examples import, so lint needs all of it.
lint: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The working tree is what is tested, with its compiled module; its requirements are among LightZero's.
lightzero: $(LIGHTZERO_VENV)/module.stamp
	@LIGHTZERO= PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m pytest $(IN_PROCESSES) $(LIGHTZERO_TESTS) $(ARGS)
	@PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m tests.compare_old_new_cache
	@PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m benchmarks.benchmark_kv_cache --quick

# LIGHTZERO: a checkout of LightZero's main branch, which is on no package index. Nothing in it is changed.
LIGHTZERO ?=
ifeq ($(strip $(LIGHTZERO)),)
lightzero-main:
	@echo 'skipped: no checkout of LightZero to test with. Say where one is: make lightzero-main LIGHTZERO=path/to/checkout'
else
lightzero-main: $(LIGHTZERO_VENV)/main.stamp
	@LIGHTZERO='$(abspath $(LIGHTZERO))' PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m tests.lightzero_checkout
	@LIGHTZERO='$(abspath $(LIGHTZERO))' PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m tests.lightzero_main_trees
	@LIGHTZERO='$(abspath $(LIGHTZERO))' PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m pytest -rs $(IN_PROCESSES) $(LIGHTZERO_MAIN_TESTS) $(ARGS)
	@LIGHTZERO= PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m benchmarks.benchmark_kv_cache --quick --main '$(abspath $(LIGHTZERO))'
endif

# Nothing is downloaded but packages: the models are tiny, and random.
transformers: $(TRANSFORMERS_VENV)/stamp
	@PYTHONPATH=. HF_HUB_OFFLINE=1 $(TRANSFORMERS_VENV)/bin/python -m pytest $(wildcard tests/test_transformers_*.py) tests/test_public_names.py $(ARGS)

# TensorBoard joins the environment here. Without a Prometheus, what asks one is skipped, which is said.
metrics: $(VENV)/metrics-test.stamp
	@PROMETHEUS="$$(PROMETHEUS='$(PROMETHEUS)' .ci/prometheus)" PYTHONPATH=. $(BIN)/python -m pytest -rs \
	    $(wildcard tests/test_metrics*.py) tests/test_top.py tests/test_search_trees.py $(ARGS)

# A search over a tree of text: countdown puzzles, and a tiny model that is in the repository.
text-tree: $(TRANSFORMERS_VENV)/stamp
	@HF_HUB_OFFLINE=1 $(TRANSFORMERS_VENV)/bin/python -m examples.text_tree $(ARGS)

# Ray reports its use to its makers unless told not to.
ray play-ray lightzero-ray train-lightzero-ray: export RAY_USAGE_STATS_ENABLED = 0
ray: $(RAY_VENV)/stamp
	@PYTHONPATH=. $(RAY_VENV)/bin/python -m pytest $(wildcard tests/test_ray_*.py) tests/test_public_names.py $(ARGS)

play-ray: $(RAY_VENV)/stamp
	@$(RAY_VENV)/bin/python -m examples.cartpole --ray $(ARGS)

# Ray joins LightZero's environment here.
lightzero-ray: $(LIGHTZERO_VENV)/ray.stamp
	@PYTHONPATH=. $(LIGHTZERO_VENV)/bin/python -m pytest $(LIGHTZERO_RAY_TESTS) $(ARGS)

train-lightzero-ray: $(LIGHTZERO_VENV)/ray.stamp
	@$(LIGHTZERO_VENV)/bin/python -m examples.lightzero_ray $(ARGS)

clean:
	rm -rf $(VENV) $(LIGHTZERO_VENV) $(TRANSFORMERS_VENV) $(DOCS_VENV) $(RAY_VENV) $(FREETHREADED) build dist site *.egg-info .hypothesis .mutants .mypy_cache .pytest_cache .ruff_cache
	rm -f concurrent_kv/_native*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "concurrent_kv needs Python 3.10 or later: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

# A PYTHON= that an environment was not made with would be passed over in silence: it is said instead. (Never a file.)
SAME_PYTHON := $(addsuffix /same-python,$(VENV) $(LIGHTZERO_VENV) $(TRANSFORMERS_VENV) $(DOCS_VENV) $(RAY_VENV) $(FREETHREADED))
VERSION_OF := -c 'import sys; print(sys.version)'
.PHONY: $(SAME_PYTHON)
$(SAME_PYTHON): %/same-python: | %/bin/python
	@$(if $(filter file,$(origin PYTHON)),:,test "$$($(PYTHON) $(VERSION_OF))" = "$$($*/bin/python $(VERSION_OF))" || { \
	    echo "$* was made with $$($*/bin/python -V), and PYTHON=$(PYTHON) is $$($(PYTHON) -V): remove $*, or leave PYTHON out" >&2; \
	    exit 1; })

# One extra a stamp: play.stamp, test.stamp, dev.stamp. The interpreter is order-only because its link carries the time
# stamp of the system's Python, which would make every stamp look old after an upgrade of that.
$(VENV)/%.stamp: pyproject.toml constraints.txt $(BUILD) | $(BIN)/python $(VENV)/same-python
	@echo "installing the packages that make $(MAKECMDGOALS) needs ($*) into $(VENV); $(LARGE)"
	@$(call forget_module,$(BIN)/python)
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[$*]"
	@touch $@

$(LIGHTZERO_VENV)/bin/python:
	@$(PYTHON) -m venv $(LIGHTZERO_VENV)

$(LIGHTZERO_VENV)/stamp: requirements/lightzero.txt requirements/lightzero-nodeps.txt | $(LIGHTZERO_VENV)/bin/python $(LIGHTZERO_VENV)/same-python
	@echo "installing LightZero 0.2.0 and what it needs into $(LIGHTZERO_VENV); $(LARGE)"
	@$(LIGHTZERO_VENV)/bin/python $(PIP_INSTALL) -r requirements/lightzero.txt
	@$(LIGHTZERO_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements/lightzero-nodeps.txt
	@touch $@

$(LIGHTZERO_VENV)/module.stamp: pyproject.toml $(BUILD) $(LIGHTZERO_VENV)/stamp
	@$(call forget_module,$(LIGHTZERO_VENV)/bin/python)
	@$(LIGHTZERO_VENV)/bin/python $(PIP_INSTALL) --no-deps -e .
	@touch $@

$(LIGHTZERO_VENV)/main.stamp: requirements/lightzero-main.txt $(LIGHTZERO_VENV)/module.stamp
	@echo "installing what LightZero's main branch needs beside 0.2.0"
	@$(LIGHTZERO_VENV)/bin/python $(PIP_INSTALL) -r requirements/lightzero-main.txt -c requirements/lightzero.txt
	@touch $@

$(LIGHTZERO_VENV)/ray.stamp: requirements/lightzero-ray.txt $(LIGHTZERO_VENV)/module.stamp
	@echo "installing Ray beside LightZero 0.2.0"
	@$(LIGHTZERO_VENV)/bin/python $(PIP_INSTALL) -r requirements/lightzero-ray.txt -c requirements/lightzero.txt
	@touch $@

$(DOCS_VENV)/bin/python:
	@$(PYTHON) -m venv $(DOCS_VENV)

$(DOCS_VENV)/stamp: requirements/docs.txt | $(DOCS_VENV)/bin/python $(DOCS_VENV)/same-python
	@echo "installing what builds the documentation into $(DOCS_VENV): 60 MB"
	@$(DOCS_VENV)/bin/python $(PIP_INSTALL) -r requirements/docs.txt
	@touch $@

$(TRANSFORMERS_VENV)/bin/python:
	@$(PYTHON) -m venv $(TRANSFORMERS_VENV)

$(TRANSFORMERS_VENV)/stamp: pyproject.toml requirements/transformers.txt $(BUILD) | $(TRANSFORMERS_VENV)/bin/python $(TRANSFORMERS_VENV)/same-python
	@echo "installing transformers and what its tests need into $(TRANSFORMERS_VENV); $(LARGE)"
	@$(call forget_module,$(TRANSFORMERS_VENV)/bin/python)
	@$(TRANSFORMERS_VENV)/bin/python $(PIP_INSTALL) -c requirements/transformers.txt -e ".[transformers]" -r requirements/transformers.txt
	@touch $@

$(RAY_VENV)/bin/python:
	@$(PYTHON) -m venv $(RAY_VENV)

$(RAY_VENV)/stamp: pyproject.toml requirements/ray.txt $(BUILD) | $(RAY_VENV)/bin/python $(RAY_VENV)/same-python
	@echo "installing Ray and what its tests need into $(RAY_VENV); $(LARGE)"
	@$(call forget_module,$(RAY_VENV)/bin/python)
	@$(RAY_VENV)/bin/python $(PIP_INSTALL) -c requirements/ray.txt -e ".[ray,play,prometheus,snapshots]" -r requirements/ray.txt
	@touch $@

.PHONY: stress stress-full
stress: $(VENV)/stress.stamp
	@$(BIN)/python -m stress $(ARGS)

# Half an hour: every profile with every fault. A summary of its figures is kept.
stress-full: $(VENV)/stress.stamp
	@mkdir -p stress/results
	@$(BIN)/python -m stress --profile all --faults all --seconds 260 \
	    --summary stress/results/full.json $(ARGS)

# Any free-threaded interpreter, 3.13t or later: make test-freethreaded PYTHON=python3.14t. What needs no torch is tested
# without it; with WHOLE=1 torch is installed too and all tests run that it can import. Torch takes a gigabyte:
# FREETHREADED=DIRECTORY keeps the environment elsewhere, for several checkouts.
WHOLE ?=
.PHONY: test-freethreaded freethreaded
test-freethreaded: freethreaded
	@PYTHON_GIL=0 $(FREETHREADED)/bin/python -m pytest \
	    $(if $(WHOLE),,--noconftest tests/test_without_torch.py) $(ARGS)

# The environment, and the compiled module of this checkout for it.
freethreaded: $(FREETHREADED)/$(if $(WHOLE),whole,parts).stamp
	@$(call forget_module,$(FREETHREADED)/bin/python)
	@$(FREETHREADED)/bin/python setup.py -q build_ext --inplace

# An interpreter and an environment of its own, which it makes the first time, in twenty minutes: docs/compiled.md.
.PHONY: test-threadsanitizer
test-threadsanitizer:
	@.ci/threadsanitizer

$(FREETHREADED)/bin/python:
	@$(PYTHON) -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED") and "not a free-threaded build: make test-freethreaded PYTHON=python3.14t")'
	@$(PYTHON) -m venv $(FREETHREADED)

$(FREETHREADED)/parts.stamp: requirements/freethreaded.txt constraints.txt | $(FREETHREADED)/bin/python $(FREETHREADED)/same-python
	@echo "installing what the tests without torch need"
	@$(FREETHREADED)/bin/python $(PIP_INSTALL) --no-warn-conflicts -c constraints.txt -r requirements/freethreaded.txt
	@touch $@

$(FREETHREADED)/whole.stamp: $(wildcard requirements/freethreaded-*.txt) requirements/torch_without_cuda.py $(FREETHREADED)/parts.stamp
	@echo "installing torch and what all tests need"
	@$(FREETHREADED)/bin/python requirements/torch_without_cuda.py -r requirements/freethreaded-torch.txt
	@$(FREETHREADED)/bin/python $(PIP_INSTALL) --no-warn-conflicts --only-binary :all: -r requirements/freethreaded-whole.txt
	@touch $@
