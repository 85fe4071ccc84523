# make demo       set up, then all four stages on the embedded corpus, ending in the table of F1 figures
# make test       set up, then all tests
# make ablation   the controls of the method on other seeds of the embedded corpus
# make reason     when must a guard reason? labels and reasoning, by how many facts a verdict combines
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

setup: $(VENV)/ready

# what lies in out/ from before is moved aside, never deleted
demo: setup
	@if [ -e out ]; then kept=out-$$(date +%Y%m%d-%H%M%S); mv out $$kept; echo "moved the old out/ to $$kept/"; fi
	$(BIN)/python train_sft.py
	$(BIN)/python mine_hard.py
	$(BIN)/python train_dpo.py
	$(BIN)/python eval.py

test: setup
	$(BIN)/python tests/run_all.py

ablation: setup
	$(BIN)/python tools/ablation.py

reason: setup
	$(BIN)/python tools/reason.py

.PHONY: setup demo test ablation reason
