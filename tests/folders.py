"""Bundle folders and what a model with one bundle on gives, for tests of sharing."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from models import TINY, batch, logits
from peft import LoraConfig, PeftModel, get_peft_model


NAMES = ["b_mlp", "b_linear", "b_diag"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def only(model, name):
    """Logits with one bundle on."""
    with model.alphas({other: 0.0 for other in NAMES if other != name}):
        return logits(model, batch())


def loaded(folder, name="llama"):
    return PeftModel.from_pretrained(TINY[name](), str(folder)).eval()


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def lora(folder):
    get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}" * 100)
