"""What a bundle weighs on disk, and how long a model that generates is held up when one is swapped. One JSON record.

    python benchmarks/hot_swap.py --output benchmarks/results/hot_swap.json

SmolLM2-135M (as examples/quickstart.py gets it), a preset of six bundles with random weights, composed from six files.
`load_bundle(..., replace=True)` is timed as a whole (reading, checking, building, switching; also the processor time it
took of its thread) and the time for which it holds up calls that start, in an idle model and while another thread
generates. Then with compiled decoder blocks: forwards after a change of the set or of an alpha, and programs compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.core.base import find_blocks
from studies.data.smollm import model_folder
from studies.records import made_by, write


def swaps(model: Any, folders: list[Path], times: int) -> dict[str, float]:
    """Medians over `times` replacements, in milliseconds."""
    use, whole, own, held = model.base_model._state.use, [], [], []
    lock = use.lock
    for i in range(times):
        use.lock = timed = Timed(lock)
        start, spent = time.perf_counter(), time.thread_time()
        peft_bundles.load_bundle(model, folders[i % len(folders)], "b_rl_policy", replace=True)
        whole.append(time.perf_counter() - start)
        own.append(time.thread_time() - spent)
        held.append(timed.longest)
    use.lock = lock
    found = {"whole_ms": whole, "whole_processor_ms": own, "held_up_ms": held}
    return {name: round(1e3 * statistics.median(values), 3) for name, values in found.items()}


def compiled(model: Any, ids: torch.Tensor, names: list[str], folders: list[Path], times: int) -> dict[str, Any]:
    """Forwards with compiled decoder blocks: after the first, after a replacement, after a new number for an alpha; and
    how many programs there are before and after all of that."""

    def forward(**alphas: float) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, alphas=alphas).logits.sum().item()
        return time.perf_counter() - start

    base = model.get_base_model()
    for name in find_blocks(base):
        base.get_submodule(name).compile()
    found: dict[str, list[float]] = {"again": [], "after_a_replacement": [], "after_an_alpha": []}
    first = forward(b_rl_policy=0.5)
    programs = counters["stats"]["unique_graphs"]
    for i in range(times):
        found["again"].append(forward(b_rl_policy=0.5))
        peft_bundles.load_bundle(model, folders[i % len(folders)], "b_rl_policy", replace=True)
        found["after_a_replacement"].append(forward(b_rl_policy=0.5))
        found["after_an_alpha"].append(forward(b_rl_policy=0.01 * i))
    peft_bundles.remove_bundle(model, names[0])
    removed = forward()
    return {
        "first_forward_s": round(first, 1),
        **{f"{name}_ms": round(1e3 * statistics.median(values), 1) for name, values in found.items()},
        "after_a_removal_ms": round(1e3 * removed, 1),
        "programs": programs,
        "programs_at_the_end": counters["stats"]["unique_graphs"],
    }


class Timed:
    """A lock, and the longest time for which this thread had it."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.thread, self.longest, self.since = lock, threading.get_ident(), 0.0, 0.0

    def __enter__(self) -> None:
        self.lock.acquire()
        if threading.get_ident() == self.thread:
            self.since = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if threading.get_ident() == self.thread:
            self.longest = max(self.longest, time.perf_counter() - self.since)
        self.lock.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--times", type=int, default=9)
    options = parser.parse_args()
    source = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source)
    model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate", task_type="CAUSAL_LM", init_weights=False))
    names = list(model.peft_config["default"].bundles)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        for name in names:
            peft_bundles.save_bundle(model, name, Path(root) / name)
        result["save_s_a_bundle"] = (time.perf_counter() - start) / len(names)
        model.save_pretrained(Path(root) / "whole")
        size = {n: (Path(root) / n / "adapter_model.safetensors").stat().st_size for n in [*names, "whole"]}
        result["megabytes"] = {n: round(s / 1e6, 2) for n, s in size.items()}
        for parameter in (p for n, p in model.named_parameters() if ".b_rl_policy" in n):
            parameter.data.mul_(0.5)
        peft_bundles.save_bundle(model, "b_rl_policy", Path(root) / "second")
        start = time.perf_counter()
        composed = peft_bundles.compose(model.unload(), [Path(root) / name for name in names])
        result["compose_s"] = time.perf_counter() - start
        composed.set_alphas(dict.fromkeys(names, 0.01))  # weights are random
        folders = [Path(root) / "second", Path(root) / "b_rl_policy"]
        result["idle"] = swaps(composed, folders, options.times)
        inputs, stop, tokens = tokenizer("The sea", return_tensors="pt"), threading.Event(), []

        def generate() -> None:
            while not stop.is_set():
                tokens.append(composed.generate(**inputs, max_new_tokens=8, do_sample=False).shape[1])

        thread = threading.Thread(target=generate)
        thread.start()
        result["while_another_thread_generates"] = swaps(composed, folders, options.times)
        stop.set()
        thread.join()
        result["generations_meanwhile"] = len(tokens)
        ids = inputs["input_ids"].expand(8, -1).contiguous()
        result["compiled"] = compiled(composed, ids, names, folders, options.times)
    record = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        **made_by("python benchmarks/hot_swap.py", device="cpu"),
        "device": f"CPU, {os.cpu_count()} cores (shared), {torch.get_num_threads()} threads, {platform.machine()}",
        **result,
    }
    write(options.output, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
