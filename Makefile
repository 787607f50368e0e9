# Every target builds .venv first if it is missing, incomplete or older than pyproject.toml or constraints.txt.

STAMP := .venv/.ready
RUN := OMP_NUM_THREADS=1 .venv/bin/python -m

# glibc then keeps the memory of freed tensors for the next ones, in place of giving it back to the system and asking
# for it again at every step of training. Other systems ignore it.
export MALLOC_TRIM_THRESHOLD_ := 4000000000
export MALLOC_MMAP_THRESHOLD_ := 4000000000

# The first Python that is new enough and can make a virtual environment; else `python3`, and set-up says what is wrong.
PYTHON = $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)

# JupyterLab refuses to run as root, as in a container, unless told so.
ROOT_FLAG = $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help lab test check book chapter serve notebooks robust record fuzz format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

lab: $(STAMP)  ## open the book in JupyterLab; ARGS="--no-browser --port 8899" are passed on
	@.venv/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/book/intro.md $(ROOT_FLAG) $(ARGS)

test: $(STAMP)  ## run every check: style, types, library, notebooks, claims, site; FRESH=1 ignores what is kept
	@$(RUN) tools.check

check: $(STAMP)  ## the same as far as something changed, without the site: minutes
	@$(RUN) tools.check --changed

book: $(STAMP)  ## execute what has changed and build the site into site/
	@$(RUN) tools.book build

chapter: $(STAMP)  ## execute one chapter and build its page: make chapter C=neurons/polycom
	@$(RUN) tools.book chapter $(C)

serve: $(STAMP)  ## show the site on this machine; ARGS="--port 8001" for another port
	@$(RUN) tools.book serve $(ARGS)

notebooks: $(STAMP)  ## write plain .ipynb copies of chapters and labs into notebooks/
	@$(RUN) tools.book notebooks

robust: $(STAMP)  ## the verdicts under other processors' instructions; C="neurons/polycom ..." for some, ARGS=--library
	@$(RUN) tools.robust $(C) $(ARGS)

record: $(STAMP)  ## run chapters at scale laptop and keep what came out: make record C=neurons/polycom
	@$(RUN) tools.record $(C)

fuzz: $(STAMP)  ## drawn inputs for the kernels: 10,000 an op for the definition, 500 for the Triton path
	@POLYLIB_FUZZ=10000 TRITON_INTERPRET=1 $(RUN) pytest tests/fuzz -q

format: $(STAMP)  ## format code and cells, and write what follows book/chapters.yml
	@$(RUN) tools.lint --fix

clean:  ## remove everything that the commands above made, .venv too
	rm -rf .venv .venv.incomplete .executed .site site notebooks screenshots .pytest_cache .ruff_cache *.egg-info

$(STAMP): pyproject.toml constraints.txt tools/setup.py
	@command -v $(PYTHON) >/dev/null || { echo "polylib needs Python 3.11 or newer, and found no python3."; exit 1; }
	@$(PYTHON) tools/setup.py
