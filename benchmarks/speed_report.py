"""Writes docs/speed.md from what benchmarks/speed.py measured.

python benchmarks/speed_report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = {"gpu": "benchmarks/results/speed_h200.json", "cpu": "benchmarks/results/speed_cpu.json"}
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
FULL = [8, 1024]  # the goals' batch


def read() -> dict[str, Any]:
    paths = {device: ROOT / path for device, path in RESULTS.items()}
    return {device: json.loads(path.read_text(encoding="utf-8")) for device, path in paths.items() if path.exists()}


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


def goals(gpu: Any, cpu: Any) -> Iterator[tuple[str, str, list[float] | None]]:
    """What is asked, the bound, and the ratios found (None: not measured)."""

    def compared(record: Any, shape: str, section: str, name: str, other: str) -> list[float] | None:
        found = cells(record, shape, section)
        return ratios(found, name, other) if {name, other} <= found.keys() else None

    training = cells(gpu, "1.2b", "train")
    yield "15 bundles routed / base", "1.05", compared(gpu, "1.2b", "train", "bundles_15_routed", "base")
    yield "15 bundles routed / LoRA r16", "0.85", compared(gpu, "1.2b", "train", "bundles_15_routed", "lora_r16")
    yield "64 bundles / 1 bundle", "1.05", compared(gpu, "1.2b", "train", "bundles_64", "bundles_1")
    yield "rows routed / unrouted", "1.02", compared(gpu, "1.2b", "train", "bundles_15_routed", "bundles_15")
    same = cells(gpu, "1.2b", "same_rows")
    several = {"forward", "one_loss", "four_losses"} <= same.keys()
    floor = f"{median(floors(same)):.3f}" if several else "floor of the run"
    yield "four same-row losses / one", floor, ratios(same, "four_losses", "one_loss") if several else None
    both = {"base", "bundles_15"} <= training.keys()
    yield (
        "peak memory, 15 bundles / base",
        "1.05",
        memory_ratio(gpu["results"]["1.2b"]["train"], "bundles_15") if both else None,
    )
    yield "decode, batch 1, eager / base", "1.20", compared(gpu, "1.2b", "decode", "bundles_15/1", "base/1")
    graphed = compared(gpu, "1.2b", "graphs", "bundles_15/cuda_graph", "base/cuda_graph")
    yield "decode, batch 1, CUDA graph / base", "1.05", graphed
    rows = compared(gpu, "1.2b", "decode", "bundles_15_row_alphas/64", "bundles_15_one_alpha/64")
    yield "decode, batch 64, alphas by row / one alpha", "1.00", rows
    yield (
        "135M on a CPU (`--batch` below): 15 bundles / LoRA r16",
        "1.00",
        compared(cpu, "135m", "train", "bundles_15", "lora_r16"),
    )


def verdict(bound: str, found: list[float] | None) -> str:
    if found is None:
        return "not measured"
    return "met" if median(found) <= float(bound) else "**not met**"


def job_tables(record: Any) -> Iterator[str]:
    for shape, sections in record["results"].items():
        for section, job in sections.items():
            if "error" in job:
                yield f"\n### {shape}, {section}\n\nFailed: `{job['error'].strip().splitlines()[-1]}`"
            elif "profile" in job:
                yield from profile(shape, job)
            else:
                yield from table(shape, section, job)


def table(shape: str, section: str, job: Any) -> Iterator[str]:
    measured = {name: cell for name, cell in job["cells"].items() if "error" not in cell}
    size = f", batch {job['batch'][0]} x {job['batch'][1]}" if section in ("train", "forward", "same_rows") else ""
    yield f"\n### {shape}, {section}{size}\n"
    memory = all("peak_over_base_weights_gib" in cell for cell in measured.values()) and section == "train"
    yield "| | trainable | ms | ratio (min to max) |" + (" peak GiB |" if memory else "")
    yield "|---|---|---|---|" + ("---|" if memory else "")
    for name, cell in measured.items():
        kind, _, rest = name.partition("/")
        first = next((n for n in measured if n.partition("/")[2] == rest), name)  # of its batch, the first cell
        first = first if section != "same_rows" else "one_loss"
        line = f"| {NAMES.get(kind, kind.replace('_', ' '))}{', ' + rest if rest else ''} "
        line += f"| {cell['trainable'] / 1e6:.1f} M " if cell["trainable"] else "| "
        line += f"| {median(cell['ms']):.2f} | {spread(ratios(measured, name, first)) if first in measured else ''} |"
        yield line + (f" {peak(measured, name, job['base_weights_gib']):.1f} |" if memory else "")
    for name, cell in job["cells"].items():
        if "error" in cell:
            yield f"\n`{name}` failed: `{cell['error'].strip().splitlines()[-1]}`"
    if section == "same_rows" and len(measured) == 3:
        yield f"\nThe floor (F + 4B) / (F + B) of this run: {spread(floors(measured))}."


def profile(shape: str, job: Any) -> Iterator[str]:
    yield f"\n### {shape}, one decoder block, kernel by kernel\n"
    yield f"`train`: forward and backward of batch {job['batch'][0]} x {job['batch'][1]}; `token`: one.\n"
    yield "| | time, us | kernels |\n|---|---|---|"
    for name, found in job["profile"].items():
        yield f"| {name} | {found['us']:.0f} | {found['calls']:.0f} |"
    for name, found in job["profile"].items():
        if name.startswith("bundles"):
            yield f"\n{name}, the slowest:\n\n| kernel | calls | us |\n|---|---|---|"
            for kernel in found["kernels"][:15]:
                yield f"| `{kernel['name'][:80].replace('|', ' ')}` | {kernel['calls']:.0f} | {kernel['us']:.0f} |"


def page(records: dict[str, Any]) -> str:
    lines = [
        "# Speed",
        "",
        "`python benchmarks/speed_report.py` writes this page from the files named below; `benchmarks/speed.py`",
        "measures them. Every table is of one process, its cells interleaved; a ratio is a median over rounds of the",
        "ratio within a round, with its smallest and largest. Weights are random. Bundles have LoRA r16's trainable",
        "parameters, however many they are; their quiet penalty is in every training step unless a row says no. A",
        "training step is forward, backward and AdamW; the base's is forward and backward to the embeddings.",
        "",
        "## Goals",
        "",
        "One H200, Llama shape of 1.2 B, batch 8 x 1024, unless a row says otherwise.",
        "",
        "| | at most | measured (min to max) | |",
        "|---|---|---|---|",
    ]
    for what, bound, found in goals(records.get("gpu"), records.get("cpu")):
        lines.append(f"| {what} | {bound} | {spread(found, 3) if found else ''} | {verdict(bound, found)} |")
    job = (records.get("gpu") or {"results": {}})["results"].get("1.2b", {}).get("train", {})
    if job and job.get("batch") != FULL:
        lines.append(f"\nMeasured at batch {job['batch'][0]} x {job['batch'][1]}.")
    for device, record in records.items():
        path = RESULTS[device]
        lines += ["", f"## {record['runs'][-1]['device']}: [`{path}`](../{path})", ""]
        lines += ["| command | date | load before | versions |", "|---|---|---|---|"]
        for run in record["runs"]:
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            lines.append(f"| `{run['command']}` | {run['date']} | {run['load'] or ''} | {versions} |")
        if device == "cpu":
            lines += [
                "",
                "Taken beside other jobs on the same cores: only the ratios mean something, and they are noisy.",
            ]
        lines += job_tables(record)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/speed.md").write_text(page(read()), encoding="utf-8")
