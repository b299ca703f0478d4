# `make demo` and `make test` are all you need: each makes .venv on first use, and again when the requirements change.
# PYTHON names the Python that a new .venv is made with: make test PYTHON=python3.12
# CONSTRAINTS names a file of versions to keep to: make setup PYTHON=python3.10 CONSTRAINTS=tools/oldest.txt
PYTHON ?= python3
CONSTRAINTS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test setup lab export docs need-quarto preview clean always

help: ## list what make can do
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/.done ## explain two-digit scenes with a ViT and a Mixer; pictures and a page go to demo/
	$(BIN)/python -m libragrad_nb.demo

test: .venv/.done ## all checks: exported modules, README, every notebook, tests/
	@$(BIN)/python tools/check.py

setup: .venv/.done ## make .venv, with the package (editable) and its tools

always:

.venv/.done: settings.ini setup.py pyproject.toml tools/setup.sh $(if $(CONSTRAINTS),always)
	@sh tools/setup.sh "$(PYTHON)" "$(CONSTRAINTS)"
	@touch $@

lab: .venv/.done ## read and edit the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs/index.ipynb

export: .venv/.done ## after editing notebooks: write the modules, README.md and Colab badges, strip notebook metadata
	$(BIN)/nbdev_export
	$(BIN)/python tools/colab.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/still.py
	$(BIN)/python tools/readme.py

docs: .venv/.done need-quarto ## render the documentation to _docs/ (needs Quarto)
	$(BIN)/python -W ignore tools/site.py --quarto
	cd _proc && PATH="$(CURDIR)/$(BIN):$$PATH" quarto render --no-execute
	rm -rf _docs && mv _proc/_docs _docs
	@echo "open _docs/index.html"

need-quarto:
	@PATH="$(CURDIR)/$(BIN):$$PATH" command -v quarto >/dev/null || { echo "make docs needs Quarto 1.9 or newer. Either: $(BIN)/pip install quarto-cli, or see https://quarto.org/docs/get-started/ (make preview shows the pages without it)"; exit 1; }

preview: .venv/.done ## the pages of the documentation without Quarto, plainer, to _preview/
	$(BIN)/python -W ignore tools/site.py --preview _preview

clean: ## remove what the other commands made, except .venv
	rm -rf demo artifacts _docs _proc _preview build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml .pytest_cache .hypothesis
	find . \( -path ./.venv -o -path ./.git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
