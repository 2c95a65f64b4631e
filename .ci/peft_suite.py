#!/usr/bin/env python3
"""PEFT's own tests of decoder models and of configs, with a `BundleConfig`: `python3 run.py peft [pytest options]`.

The wheel of PEFT has no tests, so they are taken from the source distribution of the installed version, which pip
downloads. They run on 15 tiny models with random weights, which are built here; nothing is fetched from the Hub.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


MODELS = (
    *("bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "llama", "mamba", "mistral"),
    *("mixtral", "opt", "phi", "qwen2", "qwen3"),
)
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "mixtral": {"num_local_experts": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "qwen3": {"head_dim": 8},
}
FIELDS = {
    "task_type": "CAUSAL_LM",
    "sub_bases": {"left": 12, "right": 8},
    "bundles": {
        "b_mlp": {"rank": 8, "sub_bases": ["left"]},
        "b_linear": {"rank": 6, "sub_bases": ["left", "right"], "adapter": "linear"},
    },
}
AT_LINEARS = {  # as LoRA is
    "task_type": "CAUSAL_LM",
    "place": "all-linear",
    "bundles": {"b_one": {"rank": 4}, "b_two": {"rank": 2, "use_rslora": True}},
}
# PEFT names the methods that can do a thing. Bundles can, too: (file, what it says, what it has to say, how often).
SUPPORTED = (
    ("testing_common.py", "config_cls not in (LoraConfig, RoadConfig)", "config_cls is not BundleConfig", 1),
    ("testing_common.py", "config_cls not in (LoraConfig,)", "config_cls is not BundleConfig", 1),
    ("testing_common.py", "(IA3Config, LoHaConfig, LoKrConfig, LoraConfig):", "(BundleConfig,):", 1),
    ("test_decoder_models.py", "if config_cls != LoraConfig:", "if config_cls != BundleConfig:", 2),
)
LISTS = (
    (
        "test_decoder_models.py",
        "class TestDecoderModels",
        f"PEFT_DECODER_MODELS_TO_TEST[:] = {[f'tiny-{name}' for name in MODELS]!r}\n"
        f"ALL_CONFIGS[:] = [(BundleConfig, {FIELDS!r}), (BundleConfig, {AT_LINEARS!r})]",
    ),
    ("test_config.py", "class TestPeftConfig", "ALL_CONFIG_CLASSES = ((BundleConfig, {}),)"),
)
DESELECTED = {
    "test_merge_layers and config_kwargs0": "bundles behind blocks cannot be merged",
}


def unpack(folder: Path) -> None:
    """Put PEFT's tests into `folder`, with bundles in their lists of methods."""
    wanted = f"peft=={version('peft')}"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([*pip, "--no-binary", "peft", "--dest", str(folder), wanted], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (next(folder.glob("peft-*/tests"))).rename(folder / "tests")
    (folder / "tests" / "__init__.py").touch()
    (folder / "diffusers.py").write_text("class StableDiffusionPipeline: ...\n")  # imported, not used here
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    for name, old, new, times in SUPPORTED:
        edit(folder / "tests" / name, re.escape(old), new, times)
    for name, where, lists in LISTS:
        edit(folder / "tests" / name, rf"^(?={where}\b)", f"{lists}\n\n\n", 1)


def edit(path: Path, pattern: str, new: str, times: int) -> None:
    text, changed = re.subn(pattern, lambda _: new, path.read_text(), flags=re.MULTILINE)
    if changed != times:
        sys.exit(f"{path.name} of this PEFT has {pattern!r} {changed} times, not {times}; look at what it tests now.")
    start = "import peft_bundles\nfrom peft_bundles import BundleConfig\n"
    path.write_text(text if start in text else start + text)


def build(folder: Path) -> None:
    """Save a tiny model of every kind, and a config of LoRA where PEFT's tests look for one on the Hub."""
    disable_progress_bar()
    LoraConfig().save_pretrained(str(folder / "peft-internal-testing" / "tiny-opt-lora-revision"))
    for name in MODELS:
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **SIZES, **SPECIAL.get(name, {}))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / f"tiny-{name}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        build(folder)
        few = " or ".join(f"tiny-{name}" for name in ("llama", "gpt2", "opt"))
        left_out = " or ".join(f"({test})" for test in DESELECTED)
        selected = f"BundleConfig and (not config_kwargs1 or {few}) and not ({left_out})"
        workers = str(min(os.cpu_count() or 1, 8))
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-W", "ignore", "-k", selected]
        tests = ["tests/test_decoder_models.py", "tests/test_config.py"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for test, reason in DESELECTED.items():
            print(f"left out: {test}: {reason}", flush=True)
        sys.exit(subprocess.run([*command, *tests, *sys.argv[1:]], cwd=folder, env=env).returncode)


if __name__ == "__main__":
    main()
