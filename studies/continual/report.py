"""Tables and figures of what recipes/continual.py and recipes/removal.py recorded.

    python -m studies.continual.report                        # tables.md beside this file, figures beside the records
    python -m studies.continual.report --features FOLDER      # spaces.json and spaces.svg first, from features

A number is a mean ± standard deviation over seeds; intervals are 95 %, bootstrapped over test items and over runs, in
pairs of one seed and order. A condition that was not run has no row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from studies.continual import plots, spaces, tables
from studies.continual import study as s
from studies.continual.comparisons import comparison_tables, judged_answers, task_by_task
from studies.continual.study import Study
from studies.tables import Table, write_tables


RESULTS, RUNS = Path("recipes/results/continual"), Path("recipes/continual.yaml")  # in a checkout


def all_tables(study: Study, runs: list[dict[str, Any]]) -> list[Table]:
    """Every table that has a row; `runs` are those of continual.yaml."""
    made = [
        tables.conditions(study),
        tables.against_m0(study),
        task_by_task(study),
        *comparison_tables(study),
        tables.after_every_phase(study),
        tables.interference(study),
        tables.specialisation(study),
        tables.families(study),
        tables.rates(study, runs),
        tables.alphas(study),
        judged_answers(study),
        tables.shrink(study),
        tables.spaces(study),
        *tables.removal(study),
        tables.code(study),
        tables.missing(study, runs),
    ]
    return [table for table in made if table.rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records; the figures go there too")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the YAML with the runs that were asked for")
    parser.add_argument("--features", type=Path, help="folder of features: makes spaces.json and spaces.svg anew")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tables.md"))
    options = parser.parse_args(argv)
    study = s.read(options.results)
    if options.features is not None:
        study.spaces = spaces.write(options.features, study.records, options.results, study.spaces)
    runs = yaml.safe_load(options.runs.read_text(encoding="utf-8"))["runs"]
    made_from = (
        f"`python -m studies.continual.report` from `{options.results}/*.jsonl` (`recipes/continual.py`, `removal.py`)."
    )
    write_tables(options.output, made_from, all_tables(study, runs))
    plots.draw(study, options.results)
    failed = len(study.failed) + len(study.removal_failed)
    print(f"wrote {options.output} from {len(study.records)} + {len(study.removal)} cells, {failed} failed")


if __name__ == "__main__":
    main()
