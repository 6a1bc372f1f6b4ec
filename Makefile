# Two commands: `make run` (real input to real answer) and `make test`. Each does its own set-up; tests need more tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt

.PHONY: run experiment test pythons coverage soak fuzz check audit sbom docs docs-versions perf setup clean

# Shows what the tasks answer; then plays the short version of `make experiment`, half a minute to two minutes; then stays up.
run: setup
	@$(BIN)/inference-gateway demo --with-experiment

# On real models, in about a minute and a half: INT8 goes live with evidence, and broken variants are taken back. HOW=short make
# experiment shows one of each.
experiment: setup
	@$(BIN)/inference-gateway demo --experiment $(HOW)

# The hot path compiled, where a C compiler is, and then its rooms once more as the sources stand. Where npm is, the pages'
# JavaScript is run too. Tests wait half of their time: three workers keep two cores busy, in the order of tests/conftest.py.
test: $(VENV)/.tools $(VENV)/.compiled $(if $(shell command -v npm),$(VENV)/grpc-js)
	@$(BIN)/python -m compileall -q gateway  # also where PYTHONDONTWRITEBYTECODE is set: tests start it hundreds of times
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder || .ci/once-more $(BIN)/python
	export GATEWAY_NO_EXTENSIONS=1; $(BIN)/python -m pytest -q -n 3 tests/http2 tests/rpc tests/transport tests/v2 tests/batching \
	  tests/forwarding tests/routing tests/telemetry tests/test_compiled.py || .ci/once-more $(BIN)/python

# A wheel on each Python from 3.10 to 3.14 that is here; PYTHONS=FOLDER make pythons finds more.
pythons: $(VENV)/.installed
	.ci/pythons

# Which lines of each room its tests run, on the sources. Nothing holds it to a figure; ROOMS=tests make coverage takes all
# tests, of which those that bound CPU time may fail, since counting costs.
ROOMS := tests/admin tests/api tests/batching tests/config tests/demo tests/forwarding tests/http2 tests/process \
  tests/routing tests/rpc tests/smoke tests/steps tests/telemetry tests/transport tests/upstream tests/v2 \
  $(wildcard tests/test_*.py)
coverage: export GATEWAY_NO_EXTENSIONS := 1
coverage: $(VENV)/.tools
	-$(BIN)/python -m pytest -q -n 2 --dist loadfile --cov --cov-report= $(ROOMS)
	@$(BIN)/coverage json -q -o - | $(BIN)/python .ci/coverage-by-room

# What stays proven, for an hour in place of a minute: neighbours under abuse, and answers beside Triton's own; and a hundred
# restarts, sixty killed workers and reloads, whose callers are grpc-js too where npm is; and four gateways on one PostgreSQL.
# SOAK_SECONDS=600 make soak is shorter; SOAK_SEED=7 draws as that run did, whose seed is printed. Last, the tests of properties,
# which `make test` gives the same examples each time, with new ones.
soak: export SOAK_SECONDS := $(or $(SOAK_SECONDS),3600)
soak: export SOAK_SEED := $(or $(SOAK_SEED),$(shell date +%s))
soak: $(VENV)/.tools $(if $(shell command -v npm),$(VENV)/grpc-js)
	@echo "SOAK_SECONDS=$(SOAK_SECONDS) SOAK_SEED=$(SOAK_SEED)"
	$(BIN)/python -m pytest -rA tests/neighbours tests/differences tests/faults tests/experiments \
	  tests/store/test_replicas.py tests/store/test_agreement_of_replicas.py
	$(BIN)/python -m pytest -q --hypothesis-profile=drawn \
	  $$(grep -rlE --include='*.py' '^ *@given' tests | grep -vE '^tests/(neighbours|differences)/')

$(VENV)/grpc-js: $(VENV)/.tools
	-npm install --silent --no-audit --no-fund --prefix $@ @grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1

# Inputs that reach new code of what reads others' bytes, ten minutes for each reader, on the sources; findings are new files
# in tests/fuzz/corpus. FUZZ_SECONDS=60 TARGETS="config jwt" make fuzz is shorter. atheris has wheels for Python 3.11 to 3.13.
fuzz: export GATEWAY_NO_EXTENSIONS := 1
fuzz: $(VENV)/.tools $(VENV)/.fuzz
	PYTHONPATH=$(VENV)/.fuzz $(BIN)/python tests/fuzz/fuzzer.py --seconds $(or $(FUZZ_SECONDS),600) $(TARGETS)

# In a folder of its own: its native modules are large, and nothing else needs them.
$(VENV)/.fuzz: $(VENV)/.installed
	$(INSTALL) --no-deps --upgrade --target $@ atheris==3.0.0
	@touch $@

# Has each Python what the sources use of it? NumPy's own types are for 3.11 and later, so before that they say nothing.
OTHER_PYTHON := --no-warn-return-any --no-warn-unused-ignores --python-version

# What is compiled has to be understood by mypyc where none of the packages is installed: in a wheel's build.
AS_BUILT := --config-file= --no-site-packages --ignore-missing-imports --follow-imports=silent --python-version 3.10

check: $(VENV)/.tools $(if $(shell command -v npm),$(VENV)/buf)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy $(OTHER_PYTHON) 3.10
	$(BIN)/mypy $(OTHER_PYTHON) 3.14
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/mypy $(AS_BUILT) $(patsubst %,gateway/%,forwarding http2 routing rpc transport upstream v2 telemetry api/relay.py api/stream_caller.py)
	$(BIN)/lint-imports
	$(if $(shell command -v npm),cd protos && ../$(VENV)/buf/node_modules/.bin/buf lint && ../$(VENV)/buf/node_modules/.bin/buf format --diff --exit-code)
	$(BIN)/python -m pytest -q tests/config/test_reference.py   # is docs/configuration.md what the schema says?
	$(BIN)/python -m pytest -q tests/deploy/test_dependencies.py # has a version that is allowed a known advisory?

# Judges protos/, where npm is.
$(VENV)/buf: $(VENV)/.installed
	npm install --silent --no-audit --no-fund --prefix $@ @bufbuild/buf@1.75.0

# Has any package of constraints.txt a published advisory? Asks PyPI, so it is no part of `make check`, which holds the versions
# to what was known when .ci/advisories.txt was last looked over (tests/deploy/test_dependencies.py).
audit: $(VENV)/.supply/made
	$(VENV)/.supply/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# All that an installation has, in dist/: of a new environment, since .venv has tools for tests beside it.
sbom: $(VENV)/.supply/made
	@$(PYTHON) -m venv --clear $(VENV)/.shipped
	CC=no-compiler $(BIN)/python -m pip --python $(VENV)/.shipped/bin/python install -q --disable-pip-version-check -c constraints.txt .
	@mkdir -p dist
	$(VENV)/.supply/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
	  --output-file dist/inference-gateway.cdx.json $(VENV)/.shipped/bin/python

$(VENV)/.supply/made: $(VENV)/.installed
	@$(PYTHON) -m venv $(VENV)/.supply
	$(VENV)/.supply/bin/pip install -q --disable-pip-version-check -c constraints.txt cyclonedx-bom==7.5.0 pip-audit==2.10.1
	@touch $@

# The pages as a site, with a search, in dist/site; a link that leads nowhere ends it. Any server of files can serve it.
docs: $(VENV)/.docs/made
	$(VENV)/.docs/bin/sphinx-build -q -W --keep-going -b html -c docs/site -d build/site . dist/site

# The same for each release beside the pages as they are here, in dist/versions; a page's side leads to its other versions.
docs-versions: $(VENV)/.docs/made
	@$(BIN)/python docs/site/versions.py $(VENV)/.docs/bin/sphinx-build

$(VENV)/.docs/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sphinx needs Python 3.11 or newer: make docs PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)/.docs
	$(VENV)/.docs/bin/pip install -q --disable-pip-version-check sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19
	@touch $@

# Load tests against Envoy, nginx and HAProxy, 30 minutes; see perf/README.md. For a first look: make perf ROUNDS=1 ONLY=tiny
ROUNDS := 5
perf: setup $(VENV)/.perf $(VENV)/.compiled
	@$(BIN)/python -m perf --rounds $(ROUNDS) $(if $(ONLY),--only $(ONLY))

$(VENV)/.perf: $(VENV)/.installed
	$(INSTALL) -e '.[local,perf]'
	@touch $@

# A checkout runs its sources, so that what is edited is what runs; COMPILE=1 compiles the hot path.
setup: $(VENV)/.installed $(if $(COMPILE),$(VENV)/.compiled)
	@$(BIN)/python -c 'from gateway.compiled import is_compiled as c; print("The hot path is", "compiled." if c() else \
	  "interpreted, which takes 1.5 times the CPU; make setup COMPILE=1 compiles it, in about a minute.")'

SOURCES := pyproject.toml $(shell find gateway -name '*.py' -not -path 'gateway/v1/*')

$(VENV)/.compiled: $(VENV)/.installed $(SOURCES)
	@echo "Compiling the hot path, where a C compiler is, without a word, for about a minute."
	GATEWAY_COMPILE=1 $(INSTALL) --no-deps -e .
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/gateway/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip==26.3
	$(INSTALL) -e '.[local]'
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(INSTALL) -e '.[local,dev]'
	@touch $@

clean:
	rm -rf $(VENV) gateway__mypyc.*.so gateway/*.so gateway/*/*.so gateway/*/*/*.so gateway/compiled.json build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis gateway/v1
