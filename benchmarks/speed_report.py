"""Tables of what benchmarks/speed.py measured: benchmarks/results/tables.md.

    python benchmarks/speed_report.py

A table is of one run, its cells interleaved; a ratio is a median over rounds of the ratio within a round, with the
smallest and the largest. Memory is allocated on a GPU and resident on a CPU, with the base model's weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from studies.tables import Table, write_tables


RESULTS = Path(__file__).resolve().parent / "results"
Cells = dict[str, Any]

NAMES = {
    "base": "base alone",
    "lora_r16": "PEFT LoRA r16, all linears",
    "lora_r64": "PEFT LoRA r64, all linears",
    "lora_4x4": "PEFT LoRA, 4 adapters r4 active",
    "xlora": "X-LoRA, 4 experts r4, all trainable",
    "bundles_1": "1 bundle",
    "bundles_6": "6 bundles",
    "bundles_15": "15 bundles",
    "bundles_64": "64 bundles",
    "bundles_15_routed": "15 bundles, rows of four signals routed",
    "bundles_15_quiet0": "15 bundles, no quiet penalty",
}


def read() -> dict[str, Any]:
    """File name -> record of every measurement: GPUs first, the newest first."""
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("speed_*.json"))}
    newest = sorted(found.items(), key=lambda item: newness(item[1]), reverse=True)
    return dict(sorted(newest, key=lambda item: on_cpu(item[1])))


def newness(record: Any) -> tuple[str, str]:
    return record["runs"][-1]["date"], record["runs"][-1]["device"]


def on_cpu(record: Any) -> bool:
    return record["runs"][-1]["device"].startswith("CPU")


def cells(record: Any, shape: str, section: str) -> Cells:
    """The cells that were measured, by name; empty without that job."""
    found = record["results"].get(shape, {}).get(section, {}).get("cells", {}) if record else {}
    return {name: cell for name, cell in found.items() if "error" not in cell}


def ratios(cells: Cells, name: str, other: str) -> list[float]:
    """Of two cells, round by round."""
    return [a / b for a, b in zip(cells[name]["ms"], cells[other]["ms"])]


def floors(cells: Cells) -> list[float]:
    """(F + 4B) / (F + B), round by round."""
    pairs = zip(cells["forward"]["ms"], cells["one_loss"]["ms"])
    return [(f + 4 * (both - f)) / both for f, both in pairs]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak(cells: Cells, name: str, weights: float) -> float:
    return cells[name]["peak_over_base_weights_gib"] + weights


def memory_ratio(job: Any, name: str) -> list[float]:
    weights = job["base_weights_gib"]
    return [peak(job["cells"], name, weights) / peak(job["cells"], "base", weights)]


# ---- goals ----


class Goal(NamedTuple):
    """What is asked, the largest ratio that meets it, and the ratios (None: not measured)."""

    what: str
    bound: float
    ratios: list[float] | None

    def met(self) -> bool | None:
        return None if self.ratios is None else median(self.ratios) <= self.bound


# What, the bound, section of the record, a cell and the cell it is divided by; Llama shape of 1.2 B.
GOALS = (
    ("15 bundles routed / base", 1.05, "train", "bundles_15_routed", "base"),
    ("15 bundles routed / LoRA r16", 0.85, "train", "bundles_15_routed", "lora_r16"),
    ("64 bundles / 1 bundle", 1.05, "train", "bundles_64", "bundles_1"),
    ("rows routed / unrouted", 1.02, "train", "bundles_15_routed", "bundles_15"),
    ("decode, batch 1, eager / base", 1.20, "decode", "bundles_15/1", "base/1"),
    ("decode, batch 1, CUDA graph / base", 1.05, "graphs", "bundles_15/cuda_graph", "base/cuda_graph"),
    (
        "decode, batch 64, alphas by row / one alpha",
        1.00,
        "row_alphas",
        "bundles_15_row_alphas/64",
        "bundles_15_one_alpha/64",
    ),
)


def goals(record: Any) -> list[Goal]:
    """The goals of one GPU's record."""
    made = []
    for what, bound, section, name, other in GOALS:
        measured = cells(record, "1.2b", section)
        made.append(Goal(what, bound, ratios(measured, name, other) if {name, other} <= measured.keys() else None))
    same = cells(record, "1.2b", "same_rows")
    several = {"forward", "one_loss", "four_losses"} <= same.keys()
    floor = round(median(floors(same)), 3) if several else float("nan")
    made.append(Goal("four same-row losses / one", floor, ratios(same, "four_losses", "one_loss") if several else None))
    trained = {"base", "bundles_15"} <= cells(record, "1.2b", "train").keys()
    memory = memory_ratio(record["results"]["1.2b"]["train"], "bundles_15") if trained else None
    return [*made, Goal("peak memory, 15 bundles / base", 1.05, memory)]


def cpu_goal(record: Any) -> Goal | None:
    """15 bundles against LoRA on a CPU."""
    measured = cells(record, "135m", "train")
    if not {"bundles_15", "lora_r16"} <= measured.keys():
        return None
    rows, length = record["results"]["135m"]["train"]["batch"]
    what = f"135M on a CPU, batch {rows} x {length}: 15 bundles / LoRA r16"
    return Goal(what, 1.00, ratios(measured, "bundles_15", "lora_r16"))


def goal_table(measured: dict[str, Any]) -> Table:
    rows = []
    for name, record in measured.items():
        every = [cpu_goal(record)] if on_cpu(record) else goals(record)
        for goal in every:
            if goal is not None and goal.ratios is not None:
                met = "yes" if goal.met() else "no"
                rows.append([goal.what, f"{goal.bound:g}", spread(goal.ratios, 3), met, f"`{name}`"])
    return Table("Goals", ["ratio", "at most", "measured", "met", "record"], rows)


# ---- a record ----


def run_table(name: str, record: Any) -> Table:
    """The runs that a record was filled by."""
    rows = []
    for run in record["runs"]:
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        load = "" if run.get("load") is None else str(run["load"])
        rows.append([f"`{run['command']}`", str(run["date"]), run.get("commit") or "", load, versions])
    heading = f"{record['runs'][-1]['device']}: `{name}`"
    return Table(heading, ["command", "date", "commit", "load before", "versions"], rows)


def job_tables(record: Any) -> Iterator[Table]:
    for shape, sections in record["results"].items():
        for section, job in sections.items():
            if "profile" in job:
                yield from profile(shape, job)
            elif "error" not in job:
                yield job_table(shape, section, job)


def job_table(shape: str, section: str, job: Any) -> Table:
    """Milliseconds of every cell, and the ratio to the first cell of its batch."""
    measured = {name: cell for name, cell in job["cells"].items() if "error" not in cell}
    size = f", batch {job['batch'][0]} x {job['batch'][1]}" if section in ("train", "forward", "same_rows") else ""
    memory = section == "train" and all("peak_over_base_weights_gib" in cell for cell in measured.values())
    columns = ["", "trainable", "ms", "ratio (min to max)"]
    columns += ["peak GiB"] if memory else ["tokens/s"] if section == "generate" else []
    rows = []
    for name, cell in measured.items():
        kind, _, rest = name.partition("/")
        first = next((n for n in measured if n.partition("/")[2] == rest), name)
        first = first if section != "same_rows" else "one_loss"
        row = [f"{NAMES.get(kind, kind.replace('_', ' '))}{', ' + rest if rest else ''}"]
        row += [f"{cell['trainable'] / 1e6:.1f} M" if cell["trainable"] else "", f"{median(cell['ms']):.2f}"]
        row.append(spread(ratios(measured, name, first)) if first in measured else "")
        if memory:
            row.append(f"{peak(measured, name, job['base_weights_gib']):.2f}")
        elif section == "generate":  # ms of a token of every row
            row.append(f"{1e3 * int(rest) / median(cell['ms']):.0f}")
        rows.append(row)
    if section == "same_rows" and len(measured) == 3:
        rows.append(["floor (F + 4B) / (F + B)", "", "", spread(floors(measured))])
    return Table(f"{shape}, {section}{size}", columns, rows)


def short(name: str) -> str:
    """A kernel's name without its template: the kernel, what it does to an element, of which type."""
    plain = name.replace("at::native::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
    kernel = re.split(r"[<(]", plain)[0]
    does = re.search(
        r"(CUDAFunctor\w*|\w*Functor|\w+_kernel_cuda|\w+KernelImpl|\w+_kernel_impl)\b", plain[len(kernel) :]
    )
    kind = re.search(r"BFloat16|Half|float|double|long|bool", plain[len(kernel) :])
    return " ".join([kernel, *([does[1]] if does else []), *([kind[0]] if kind else [])])


def profile(shape: str, job: Any) -> Iterator[Table]:
    """One decoder block kernel by kernel: `train`, forward and backward of a batch; `token`, one token."""
    measured = job["profile"]
    rows = [[name, f"{one['us']:.0f}", f"{one['calls']:.0f}"] for name, one in measured.items()]
    yield Table(f"{shape}, one decoder block", ["", "time, us", "kernels"], rows)
    for what in ("train", "token"):
        names = [name for name in ("base", "bundles_15") if f"{name}/{what}" in measured]
        sums: dict[str, dict[str, list[float]]] = {}  # kernel -> cell -> calls, us
        for name in names:
            for kernel in measured[f"{name}/{what}"]["kernels"]:
                total = sums.setdefault(short(kernel["name"]), {}).setdefault(name, [0.0, 0.0])
                total[0] += kernel["calls"]
                total[1] += kernel["us"]

        def weight(item: tuple[str, dict[str, list[float]]]) -> float:
            base, ours = (item[1].get(name, [0.0, 0.0])[1] for name in ("base", "bundles_15"))
            return max(10 * (ours - base), ours, base)

        rows = []
        for kernel, total in sorted(sums.items(), key=weight, reverse=True)[:24]:
            cells = [f"{total[n][0]:.0f}: {total[n][1]:.1f}" if n in total else "" for n in names]
            rows.append([f"`{kernel[:90].replace('|', ' ')}`", *cells])
        yield Table(f"{shape}, one decoder block, {what}: calls and us by kernel", ["kernel", *names], rows)


def tables(measured: dict[str, Any]) -> list[Table]:
    made = [goal_table(measured)]
    for name, record in measured.items():
        made += [run_table(name, record), *job_tables(record)]
    return made


if __name__ == "__main__":
    made_from = "`python benchmarks/speed_report.py` from `speed_*.json` (`benchmarks/speed.py`)."
    write_tables(RESULTS / "tables.md", made_from, tables(read()))
