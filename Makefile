# The whole project by two commands: `make repro` and `make test`. Both make `.venv` first if it is not there.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3.11
# further options of a study: make losses STUDY='--trials 4 --seeds 3'
STUDY ?=
UV_VERSION := 0.13.9
BIN := .venv/bin
STAMP := .venv/installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup lock repro gates report shapes ablation losses loss-seeds beside overopt audit sampler smoke-sdxl bench test lint format deps mlflow sync exp-show image

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## .venv from requirements.lock, hashes checked

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is needed and was not found (set PYTHON=/path/to/python3.11)"; exit 2; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(STAMP)

lock: ## resolve requirements.lock and requirements.runtime.lock anew
	uv pip compile --quiet --generate-hashes --no-emit-index-url --python-version 3.11 pyproject.toml -o requirements.runtime.lock
	uv pip compile --quiet --generate-hashes --no-emit-index-url --python-version 3.11 --extra dev -c requirements.runtime.lock pyproject.toml -o requirements.lock

# MLflow follows the files: whatever happens to it, the run stands. What could not be sent waits for `make sync`.
repro: setup ## the whole pipeline; prints the figures and where the report is
	dvc repro
	dspo sync || echo "the run stands without MLflow; \`make sync\` sends what waits"
	python -m dspo.reporting.gates reports/summary.json || echo "not every bound holds; \`make gates\` fails as long as that is so"
	@echo "report: $(CURDIR)/reports/index.html"

gates: setup ## exit 1 unless the figures of the main job hold their bounds
	python -m dspo.reporting.gates reports/summary.json

report: setup ## the report alone, from the outputs that stand here
	dvc repro --single-item report

shapes: setup ## train the small base model, CLIP and judge of the shapes world anew (hours on a CPU)
	dvc repro pipelines/shapes/dvc.yaml
	mkdir -p data/raw
	cp -r pipelines/shapes/out/shapes-sdxl pipelines/shapes/out/shapes-clip pipelines/shapes/out/shapes-judge models/
	cp pipelines/shapes/out/prompts.csv data/prompts.csv
	cp pipelines/shapes/out/shapes-rated.parquet data/raw/shapes-rated.parquet

ablation: setup ## what each part of the reward model is worth
	python -m dspo.studies.reward_ablation --params params.yaml --ratings data/ratings --output reports/studies

losses: setup ## the preference losses beside each other, tuned on validation, fresh seeds
	python -m dspo.studies.losses --params params.yaml --prompts data/prompts.csv --validation-prompts data/prompts/validation.csv \
	  --candidates data/candidates --pairs data/pairs --reward models/reward --second-judge models/shapes-judge --output reports/studies $(STUDY)
	cp reports/studies/losses.json reports/losses.json

loss-seeds: setup ## the losses at their own settings over two training seeds, as a matrix of DVC stages
	dvc repro pipelines/losses/dvc.yaml
	cp pipelines/losses/loss_seeds.* reports/studies/

beside: setup ## adapters from fewer pairs, LoRA, and the best of four base images
	python -m dspo.studies.beside --params params.yaml --prompts data/prompts.csv --pairs data/pairs --reward models/reward \
	  --second-judge models/shapes-judge --output reports/studies $(STUDY)

overopt: setup ## where the proxy goes on rising and the gold judge does not
	python -m dspo.studies.overopt --params params.yaml --prompts data/prompts.csv --rated data/raw/shapes-rated.parquet \
	  --candidates data/candidates --pairs data/pairs --second-judge models/shapes-judge --output reports/studies $(STUDY)

audit: setup ## the adapter on fresh prompts and seeds
	python -m dspo.studies.audit --params params.yaml --prompts data/prompts.csv --ratings data/ratings --adapter models/adapter --reward models/reward \
	  --second-judge models/shapes-judge --output reports/studies/audit.json $(STUDY)

sampler: setup ## the base's own best sampler setting by gold, on validation prompts
	python -m dspo.studies.base_sampler --params params.yaml --prompts data/prompts/validation.csv --output reports/studies/base.json $(STUDY)

smoke-sdxl: setup ## SDXL and ViT-L-14-336 at their true size, random weights, from prompts to adapter (a GPU, or a CPU with 24 GB)
	python tools/smoke_sdxl.py --work scratch/smoke-sdxl --transcript docs/smoke-sdxl.txt

bench: setup ## time, memory and FLOPs beside plain LoRA, stock peft and the stock recipe, on the device that is there
	python -m bench

# Three workers on two cores: some of the time a test waits, for a server or a browser.
test: setup ## all tests
	OMP_NUM_THREADS=1 pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: setup ## style, types, layers, code dependencies of the stages
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	python tools/stage_deps.py --check $(wildcard dvc.yaml pipelines/*/dvc.yaml)

format: setup ## let ruff lay out the code
	ruff check --fix .
	ruff format .

deps: setup ## write each stage's code dependencies into dvc.yaml
	python tools/stage_deps.py $(wildcard dvc.yaml pipelines/*/dvc.yaml)

mlflow: setup ## MLflow's pages over mlflow.db, brought up to date, at http://127.0.0.1:5000
	-MLFLOW_TRACKING_URI= dspo sync
	mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db --artifacts-destination $(CURDIR)/mlartifacts

sync: setup ## send to MLflow what is not there yet, experiments of `dvc exp run` included
	dspo sync

exp-show: setup ## experiments beside each other, best by gold first: what differs, and the figures that matter
	dvc exp show --csv --only-changed --sort-by evaluation.gold.win_rate --sort-order desc --keep 'evaluation.gold.win_rate$$' --drop '(?!Experiment|State|rev|world|seed|evaluation.(gold.win_rate$$|fully_right.tuned|diversity_ratio)|reward_model.macro_f1)' | python tools/exp_table.py

image: ## the container image
	docker build --tag dspo .
