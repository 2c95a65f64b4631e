# `make compat` runs the trainer's tests with older releases of trl and with the newest. Each release is installed into a
# folder of its own and takes torch and the rest from the environment that make runs in.
PYTHON ?= python3
TRL ?= 1.12.0 1.14.0 newest
TESTS = tests/trainer tests/objectives

.PHONY: compat
compat:
	@set -e; for version in $(TRL); do \
		folder=$$(mktemp -d); trap "rm -rf $$folder" EXIT; \
		wanted=trl==$$version; if [ $$version = newest ]; then wanted="trl!=1.15.*"; fi; \
		echo "== $$wanted"; \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $$folder "$$wanted"; \
		PYTHONPATH=$$folder:$(CURDIR) OMP_NUM_THREADS=1 $(PYTHON) -c "import trl; print('trl', trl.__version__, trl.__file__)"; \
		PYTHONPATH=$$folder:$(CURDIR) OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -m "not slow" $(TESTS) || exit 1; \
		rm -rf $$folder; \
	done
