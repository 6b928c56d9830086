# make demo   real weights → bundle → masks on a real MR image
# make test   every check and test (what CI runs)
# make gpu-check   on a machine with an NVIDIA GPU: kernels, engines, sessions, latencies, recorded;
#                  PARTS="kernels engines" for some of it, REHEARSE=1 on stand-ins, without a GPU
# make sbom        medsa-deploy.cdx.json: the package's libraries and licences, in CycloneDX
# make fuzz        damaged files of every format for an hour, or MINUTES=5; failures in fuzz-failures/
# make audit       known vulnerabilities and licences of the libraries; REFRESH=1 asks OSV first
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= auto
MINUTES ?= 60
SEED ?= 0

.PHONY: help demo test check unit coverage test-slow gpu-check fuzz sbom audit format clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(STAMP)
	$(BIN)/medsa-deploy demo

test: check unit

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --cov

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Half of the time by seeds, half guided by coverage; another SEED reads other files.
fuzz: $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps atheris==3.1.0
	$(BIN)/python tests/fuzz/fuzz_hour.py --minutes $(MINUTES) --seed $(SEED)

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check $(if $(REHEARSE),--rehearse) $(PARTS)

sbom: $(STAMP)
	$(BIN)/python -m benchmarks.supply_chain.sbom

audit: $(STAMP)
	$(BIN)/python -m benchmarks.supply_chain.audit $(if $(REFRESH),--refresh)

# Type checker and import linter see a plain install: an editable one hides exporters/ from them.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build .tree
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target .tree .
	cd .tree && ../$(BIN)/mypy --config-file ../pyproject.toml -p medsa_deploy
	cd .tree && PYTHONPATH=. ../$(BIN)/lint-imports --config ../pyproject.toml
	rm -rf build .tree

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Once installed, nothing here needs the network until pyproject.toml or constraints.txt change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps monailabel==0.8.5  # its client needs requests only
	touch $@

clean:
	rm -rf .venv build .tree demo *.egg-info
