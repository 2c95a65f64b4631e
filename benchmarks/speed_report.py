"""Writes docs/speed.md, and the README's table, from what benchmarks/speed.py measured.

python benchmarks/speed_report.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[1]
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
WIDTH_135M = 576


def read() -> dict[str, Any]:
    """Path -> record of every measurement: GPUs first, the newest of them first of all, of a day the larger card."""
    paths = sorted(ROOT.glob("benchmarks/results/speed_*.json"))
    records = {path.relative_to(ROOT).as_posix(): json.loads(path.read_text(encoding="utf-8")) for path in paths}
    newest = sorted(records.items(), key=lambda item: newness(item[1]), reverse=True)
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


class Goal(NamedTuple):
    """What is asked, the bound, the ratios found (None: not measured), and where the time goes."""

    what: str
    bound: str
    found: list[float] | None
    where: str = ""


def goals(record: Any) -> Iterator[Goal]:
    """Of one GPU's record."""

    def compared(section: str, name: str, other: str) -> list[float] | None:
        found = cells(record, "1.2b", section)
        return ratios(found, name, other) if {name, other} <= found.keys() else None

    def goal(what: str, bound: str, section: str, name: str, other: str, where: str = "") -> Goal:
        return Goal(what, bound, compared(section, name, other), where)

    training, many = parts(record, "bundles_15_routed", "base"), parts(record, "bundles_64", "bundles_1")
    block, token = kernels(record, "train"), kernels(record, "token")
    yield goal("15 bundles routed / base", "1.05", "train", "bundles_15_routed", "base", f"{training} {block}")
    yield goal("15 bundles routed / LoRA r16", "0.85", "train", "bundles_15_routed", "lora_r16", training)
    yield goal("64 bundles / 1 bundle", "1.05", "train", "bundles_64", "bundles_1", many)
    yield goal("rows routed / unrouted", "1.02", "train", "bundles_15_routed", "bundles_15", training)
    same = cells(record, "1.2b", "same_rows")
    several = {"forward", "one_loss", "four_losses"} <= same.keys()
    floor = f"{median(floors(same)):.3f}" if several else "floor of the run"
    over = ""
    if several:
        times = {name: median(cell["ms"]) for name, cell in same.items()}
        lowest = times["forward"] + 4 * (times["one_loss"] - times["forward"])
        over = f"{times['four_losses'] - lowest:.1f} ms over one forward and four backwards of {lowest:.1f} ms."
    yield Goal("four same-row losses / one", floor, ratios(same, "four_losses", "one_loss") if several else None, over)
    both = {"base", "bundles_15"} <= cells(record, "1.2b", "train").keys()
    memory = memory_ratio(record["results"]["1.2b"]["train"], "bundles_15") if both else None
    yield Goal("peak memory, 15 bundles / base", "1.05", memory)
    graphs, eager = cells(record, "1.2b", "graphs"), cells(record, "1.2b", "decode")
    launched = token
    if {"bundles_15/cuda_graph"} <= graphs.keys() and {"bundles_15/1"} <= eager.keys():
        one, other = median(graphs["bundles_15/cuda_graph"]["ms"]), median(eager["bundles_15/1"]["ms"])
        launched += f" As a CUDA graph a step takes {one:.2f} ms and not {other:.2f}: the CPU launches them."
    yield goal("decode, batch 1, eager / base", "1.20", "decode", "bundles_15/1", "base/1", launched)
    name = "decode, batch 1, CUDA graph / base"
    yield goal(name, "1.05", "graphs", "bundles_15/cuda_graph", "base/cuda_graph", token)
    name = "decode, batch 64, alphas by row / one alpha"
    where = "The same two kernels a block either way; one reads and multiplies the alphas by row. Checked when given."
    yield goal(name, "1.00", "row_alphas", "bundles_15_row_alphas/64", "bundles_15_one_alpha/64", where)


def cpu_goal(record: Any) -> Goal | None:
    found = cells(record, "135m", "train")
    if not {"bundles_15", "lora_r16"} <= found.keys():
        return None
    rows, length = record["results"]["135m"]["train"]["batch"]
    where = (
        f"Folding D and E takes 4 d = {4 * WIDTH_135M} operations a trained parameter and step, forward and backward, "
        f"whatever the tokens; LoRA takes 6 a token, {6 * rows * length} in all."
    )
    if "bundles_15_quiet0" in found:
        where += f" Without the quiet penalty {median(ratios(found, 'bundles_15_quiet0', 'lora_r16')):.3f}."
    what = f"135M on a CPU, batch {rows} x {length}: 15 bundles / LoRA r16"
    return Goal(what, "1.00", ratios(found, "bundles_15", "lora_r16"), where)


def parts(record: Any, name: str, other: str) -> str:
    """What each part of a training step takes more than another's, with a synchronisation after each part."""
    found = cells(record, "1.2b", "train")
    if not all("parts_ms" in found.get(n, {}) for n in (name, other)):
        return ""
    a, b = found[name]["parts_ms"], found[other]["parts_ms"]
    more = ", ".join(f"{part.replace('_', ' ')} {ms - b.get(part, 0.0):+.1f} ms" for part, ms in a.items())
    return f"Part by part, each waited for: {more}."


def kernels(record: Any, what: str) -> str:
    found = record["results"].get("1.2b", {}).get("profile", {}).get("profile", {})
    if not {f"base/{what}", f"bundles_15/{what}"} <= found.keys():
        return ""
    base, ours = found[f"base/{what}"], found[f"bundles_15/{what}"]
    return (
        f"On the GPU a block's kernels take {ours['us']:.0f} us instead of {base['us']:.0f} "
        f"({ours['calls']:.0f} kernels instead of {base['calls']:.0f})."
    )


def met(goal: Goal) -> bool:
    return goal.found is not None and median(goal.found) <= float(goal.bound)


def verdict(goal: Goal) -> str:
    if goal.found is None:
        return "not measured"
    return "met" if met(goal) else "**not met**"


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
    more = " peak GiB |" if memory else " tokens/s |" if section == "generate" else ""
    yield "| | trainable | ms | ratio (min to max) |" + more
    yield "|---|---|---|---|" + ("---|" if more else "")
    for name, cell in measured.items():
        kind, _, rest = name.partition("/")
        first = next((n for n in measured if n.partition("/")[2] == rest), name)  # of its batch, the first cell
        first = first if section != "same_rows" else "one_loss"
        line = f"| {NAMES.get(kind, kind.replace('_', ' '))}{', ' + rest if rest else ''} "
        line += f"| {cell['trainable'] / 1e6:.1f} M " if cell["trainable"] else "| "
        line += f"| {median(cell['ms']):.2f} | {spread(ratios(measured, name, first)) if first in measured else ''} |"
        if memory:
            line += f" {peak(measured, name, job['base_weights_gib']):.2f} |"
        elif section == "generate":  # ms of a token of every row
            line += f" {1e3 * int(rest) / median(cell['ms']):.0f} |"
        yield line
    for name, cell in job["cells"].items():
        if "error" in cell:
            yield f"\n`{name}` failed: `{cell['error'].strip().splitlines()[-1]}`"
    if section == "same_rows" and len(measured) == 3:
        yield f"\nThe floor (F + 4B) / (F + B) of this run: {spread(floors(measured))}."


def short(name: str) -> str:
    """A kernel's name without its template: the kernel, what it does to an element, of which type."""
    plain = name.replace("at::native::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
    kernel = re.split(r"[<(]", plain)[0]
    does = re.search(
        r"(CUDAFunctor\w*|\w*Functor|\w+_kernel_cuda|\w+KernelImpl|\w+_kernel_impl)\b", plain[len(kernel) :]
    )
    kind = re.search(r"BFloat16|Half|float|double|long|bool", plain[len(kernel) :])
    return " ".join([kernel, *([does[1]] if does else []), *([kind[0]] if kind else [])])


def profile(shape: str, job: Any) -> Iterator[str]:
    found = job["profile"]
    yield f"\n### {shape}, one decoder block, kernel by kernel\n"
    yield f"`train`: forward and backward of batch {job['batch'][0]} x {job['batch'][1]}; `token`: one.\n"
    yield "| | time, us | kernels |\n|---|---|---|"
    for name, one in found.items():
        yield f"| {name} | {one['us']:.0f} | {one['calls']:.0f} |"
    for what in ("train", "token"):
        names = [name for name in ("base", "bundles_15") if f"{name}/{what}" in found]
        table: dict[str, dict[str, list[float]]] = {}
        for name in names:
            for kernel in found[f"{name}/{what}"]["kernels"]:
                sums = table.setdefault(short(kernel["name"]), {}).setdefault(name, [0.0, 0.0])
                sums[0] += kernel["calls"]
                sums[1] += kernel["us"]
        yield f"\n`{what}`, calls and us, by kernel: those that take most in either, and those that bundles add to:\n"
        yield "| kernel |" + "".join(f" {name} |" for name in names) + "\n|---|" + "---|" * len(names)

        def us(sums: dict[str, list[float]], name: str) -> float:
            return sums.get(name, [0.0, 0.0])[1]

        def weight(row: tuple[str, dict[str, list[float]]]) -> float:
            base, ours = us(row[1], "base"), us(row[1], "bundles_15")
            return max(10 * (ours - base), ours, base)

        for kernel, sums in sorted(table.items(), key=weight, reverse=True)[:24]:
            cells = [f" {sums[n][0]:.0f}: {sums[n][1]:.1f} |" if n in sums else " |" for n in names]
            yield f"| `{kernel[:90].replace('|', ' ')}` |" + "".join(cells)


def page(records: dict[str, Any]) -> str:
    gpus = {path: record for path, record in records.items() if not on_cpu(record)}
    lines = [
        "# Speed",
        "",
        "`python benchmarks/speed_report.py` writes this page from the files named below; `benchmarks/speed.py`",
        "measures them. Every table is of one run, its cells interleaved; a ratio is a median over rounds of the",
        "ratio within a round, with its smallest and largest. Weights are random. Bundles have LoRA r16's trainable",
        "parameters, however many they are; their quiet penalty is in every training step unless a row says no. A",
        "training step is forward, backward and AdamW; the base's is forward and backward to the embeddings. Memory is",
        "what is allocated on a GPU and resident on a CPU, the base model's weights included, other cells' not.",
        "",
        "## Goals",
        "",
        "Llama shape of 1.2 B, batch 8 x 1024, unless a row says otherwise; the newest measurement decides.",
        "",
    ]
    names = [f"{record['runs'][-1]['device']}, {record['runs'][-1]['date']}" for record in gpus.values()]
    by_file = [list(goals(record)) for record in gpus.values()]
    trained = [r for r in records.values() if on_cpu(r) and cells(r, "135m", "train")]
    trained.sort(key=lambda r: math.prod(r["results"]["135m"]["train"]["batch"]))
    ours = [goal for goal in map(cpu_goal, trained) if goal]
    lines.append(f"| | at most | {' | '.join(names or ['measured'])} | |")
    lines.append("|---|---|" + "---|" * max(len(names), 1) + "---|")
    newest = by_file[0] if by_file else []
    for number, goal in enumerate(newest):
        found = [spread(each[number].found, 3) if each[number].found else "" for each in by_file]  # type: ignore[arg-type]
        lines.append(f"| {goal.what} | {goal.bound} | {' | '.join(found)} | {verdict(goal)} |")
    for goal in ours:
        found = [spread(goal.found, 3), *[""] * (len(names) - 1)]  # type: ignore[arg-type]
        lines.append(f"| {goal.what} | {goal.bound} | {' | '.join(found)} | {verdict(goal)} |")
    missed = [goal for goal in (*newest, *ours) if goal.found and not met(goal)]
    if missed:
        lines += ["", "Not met, by how much, and where the time goes:", ""]
    for goal in missed:
        over = median(goal.found) - float(goal.bound)  # type: ignore[arg-type]
        lines.append(f"- {goal.what}: {over:.3f} above. {goal.where}".rstrip())
    for path, record in gpus.items():
        job = record["results"].get("1.2b", {}).get("train", {})
        if job and job.get("batch") != FULL:
            lines.append(f"\n`{path}` was measured at batch {job['batch'][0]} x {job['batch'][1]}.")
    devices = [record["runs"][-1]["device"] for record in gpus.values()]
    earlier = [path for n, path in enumerate(gpus) if devices[n] in devices[:n]]
    if earlier:
        lines += ["", f"Earlier records of the same cards: {', '.join(f'[`{p}`](../{p})' for p in earlier)}."]
    for path, record in records.items():
        if path in earlier:
            continue
        lines += ["", f"## {record['runs'][-1]['device']}: [`{path}`](../{path})", ""]
        lines += ["| command | date | commit | load before | versions |", "|---|---|---|---|---|"]
        for run in record["runs"]:
            versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            lines.append(
                f"| `{run['command']}` | {run['date']} | {run.get('commit', '')} | {run['load'] or ''} | {versions} |"
            )
        if on_cpu(record):
            lines += [
                "",
                "Cores of a machine that others use too: only the ratios mean something, and they are noisy.",
            ]
        lines += job_tables(record)
    return "\n".join(lines) + "\n"


README = ("base", "lora_r16", "bundles_15_quiet0", "bundles_15", "bundles_15_routed", "bundles_64", "xlora")
MARKS = "<!-- speed: benchmarks/speed_report.py writes what follows -->\n", "<!-- /speed -->\n"


def readme(text: str, records: dict[str, Any]) -> str:
    """The README with the training steps of the newest measurement on a GPU."""
    path, record = next((p, r) for p, r in records.items() if not on_cpu(r) and cells(r, "1.2b", "train"))
    found, job = cells(record, "1.2b", "train"), record["results"]["1.2b"]["train"]
    run = record["runs"][job["run"]]
    size = " x ".join(str(n) for n in job["batch"])
    lines = [
        f"{run['device']}, Llama shape of 1.2 B random parameters, batch {size}, bf16 autocast, frozen base, median",
        "training step (with AdamW) and its ratio to the base's own forward and backward, runs interleaved, everything",
        "at LoRA r16's 11.3 M trainable parameters (`python benchmarks/speed.py`,",
        f"[`{path}`]({path}), {run['date']}):",
        "",
        "| | step | ratio to base (min to max) | peak memory |",
        "|---|---|---|---|",
    ]
    for name in (n for n in README if n in found):
        ratio = spread(ratios(found, name, "base")) if name != "base" else "1"
        memory = f"{peak(found, name, job['base_weights_gib']):.1f} GiB"
        what = NAMES[name] + (", no optimizer" if name == "base" else "")
        lines.append(f"| {what} | {median(found[name]['ms']):.0f} ms | {ratio} | {memory} |")
    before, _, rest = text.partition(MARKS[0])
    return before + MARKS[0] + "\n".join(lines) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2]


if __name__ == "__main__":
    measured = read()
    (ROOT / "docs/speed.md").write_text(page(measured), encoding="utf-8")
    old = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "README.md").write_text(readme(old, measured), encoding="utf-8")
