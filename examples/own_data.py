"""Your own texts: one bundle per source, trained together, saved, and switched on one by one.

    DATA=texts.jsonl python examples/own_data.py

Each line of DATA is one text, e.g. {"source": "mail", "text": "Dear all, ..."}; a source is a name of letters, digits
and "_". MODEL is a causal LM, as a Hub id or a folder. SmolLM2-135M takes less than two minutes on two CPU cores.
"""

import json
import os
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bundles import BundleConfig, BundleSpec, calibrate
from peft_bundles.objectives import LM
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig


MODEL, DATA = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"), os.environ.get("DATA", "texts.jsonl")
rows = [json.loads(line) for line in Path(DATA).read_text(encoding="utf-8").splitlines()]
sources = sorted({row["source"] for row in rows})

# Each source is a signal. Its own bundle learns from it, in its own part of the residual stream.
part = 0.5 / len(sources)
bundles = {f"b_{source}": BundleSpec(rank=part, sub_bases=[source], signals={source: 1.0}) for source in sources}
config = BundleConfig(sub_bases=dict.fromkeys(sources, part), bundles=bundles, task_type="CAUSAL_LM")
model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
model = get_peft_model(model, config)
calibrate(model, [row["text"] for row in rows], tokenizer, tokens=5_000)

objectives = [LM([row for row in rows if row["source"] == s], signal=s, max_length=64) for s in sources]
only_owners = dict.fromkeys(sources, "owners")  # in the rows of a source, only its own bundle is on
args = BundleTrainingConfig(
    "outputs/own_data", max_steps=30, per_device_train_batch_size=2, learning_rate=1e-3, forward=only_owners
)
BundleTrainer(model, args, objectives, tokenizer).train()
model.save_pretrained("outputs/own_data")

prompt = tokenizer(rows[0]["text"][:40], return_tensors="pt").to(model.device)
for on in ("none", *bundles):  # with all alphas 0 it is the base model, bit for bit
    ids = model.eval().generate(**prompt, alphas={b: float(b == on) for b in bundles}, max_new_tokens=30)
    print(f"on: {on}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}\n")
