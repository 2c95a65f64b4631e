# `make compat`: the trainer's tests against older releases of trl and the newest, each in an environment of its own
# that borrows torch and the rest from the one make runs in. TRL moves fast; this sees it before users do.
PYTHON ?= python3
TRL ?= 1.12.0 1.14.0 newest
TESTS = tests/test_trainer.py tests/test_ppo.py tests/test_resume.py tests/test_trunk_and_clamp.py tests/test_bad_input.py \
	tests/test_meta_signals.py tests/test_sharding.py tests/test_zero.py tests/test_trainer_topics.py

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
