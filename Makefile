# Everything runs in .venv, which is made from the lock files. Needs Python 3.11 and make.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo demo-seeds demo-squad squad loogle-smoke paper-plan bench-skill bench-rl chaos check test test-gpu lock clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

install: .venv/.installed  ## Make .venv from the lock files

# --no-deps: the locks are complete, and a resolver would add a torchvision that breaks a CPU torch.
# The CPU wheel of torch is on PyTorch's own index unless pip is configured to find it elsewhere.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.venv/.installed: requirements/torch.lock requirements/cpu.lock requirements/dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements/torch.lock 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) -r requirements/torch.lock
	$(PIP) -r requirements/cpu.lock -r requirements/dev.lock
	$(PIP) --no-build-isolation --editable .
	touch $@

demo: install  ## The whole method on two CPU cores, with the adapted model served at the end
	$(BIN)/past-ray run jobs/configs/demo.yaml --ask 3

demo-seeds: install  ## The demo under seeds 0, 1, 2: runs/demo-seeds/report.json
	$(BIN)/past-ray run jobs/configs/demo.yaml run_dir=runs/demo-seeds evaluation.dose_steps=[] --seeds 0,1,2

demo-squad: install  ## SmolLM2-135M on real SQuAD text (needs PAST_RAY_DATA)
	$(BIN)/past-ray run jobs/configs/demo-squad.yaml

squad: install  ## SmolLM2-135M learns SQuAD passages one by one, all arms: runs/squad/report.json (needs PAST_RAY_DATA)
	$(BIN)/past-ray run jobs/configs/cpu/squad-n1.yaml

loogle-smoke: install  ## SmolLM2-135M on real LooGLE documents, a few steps: runs/loogle/report.json (needs PAST_RAY_DATA)
	$(BIN)/past-ray run jobs/configs/cpu/loogle-smoke.yaml

paper-plan: install  ## Stages, GPUs, memory, tokens and hours of the published recipes
	$(BIN)/python -m past_ray.pipelines.paper_plan jobs/configs/paper/plans

# mergekit gets an environment of its own, so that it cannot change ours.
BENCH_PIP := .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps

.venv-bench/.installed: requirements/torch.lock requirements/bench.lock
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	$(BENCH_PIP) -r requirements/torch.lock 2>/dev/null || $(BENCH_PIP) --index-url $(TORCH_INDEX) -r requirements/torch.lock
	$(BENCH_PIP) -r requirements/bench.lock
	touch $@

bench-skill: install .venv-bench/.installed  ## Injection against mergekit and a copy: runs/bench/skill.json
	$(BIN)/python -m benchmarks.bench_skill

# TRL sees .venv, so that both sides share torch, transformers and vLLM; what it adds stays apart.
.venv-bench-rl/.installed: .venv/.installed requirements/bench-rl.lock
	test -x .venv-bench-rl/bin/python || $(PYTHON) -m venv .venv-bench-rl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-bench-rl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	.venv-bench-rl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench-rl.lock
	touch $@

bench-rl: install .venv-bench-rl/.installed  ## GRPO against TRL, and the parts of a step: runs/bench/rl.json
	$(BIN)/python -m benchmarks.bench_rl

chaos: install  ## kill -9 of random processes of a GRPO run: runs/chaos/report.json
	$(BIN)/python -m benchmarks.chaos

check: install  ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: install  ## Unit, golden, Ray, vLLM and Serve tests on CPU
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-gpu: install  ## What needs a GPU; skips without one
	$(BIN)/python -m pytest -m gpu tests/gpu

lock: install  ## Pin what is installed
	$(BIN)/python requirements/lock.py

clean:  ## Remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache
