"""Your own texts: one bundle per kind of text, trained together, saved, and switched on row by row.

Put your texts into TEXTS and run `python examples/own_data.py`: under two minutes on two CPU cores.
`MODEL=folder-or-id python examples/own_data.py` takes another causal LM. The README shows this script.
"""

import os
from pydoc_data.topics import topics  # Python's manual: text that training should leave alone

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_bundles
from peft_bundles import BundleConfig, BundleSpec
from peft_bundles.objectives import LM
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig


MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
TEXTS = {  # your texts, e.g. open("mail.txt").read().split("\n\n"); each kind gets a signal and a bundle
    "cooking": [f"Simmer the beans for {i} minutes, then add vinegar and salt." for i in range(10, 50)],
    "sailing": [f"With {i} knots of wind we reef the mainsail before the cape." for i in range(10, 50)],
}

tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
bundles = {f"b_{k}": BundleSpec(rank=0.25, sub_bases=[k], signals={k: 1.0}) for k in TEXTS}
sub_bases = dict.fromkeys(TEXTS, 0.25)  # orthogonal directions for each, a quarter of the width
model = get_peft_model(base, BundleConfig(task_type="CAUSAL_LM", sub_bases=sub_bases, bundles=bundles))
peft_bundles.calibrate(model, list(topics.values()), tokenizer, tokens=4_000)  # once, before training

objectives = [LM([{"text": t} for t in v], signal=k, max_length=32) for k, v in TEXTS.items()]  # tokens of a text
on = {k: [f"b_{k}"] for k in TEXTS}  # the bundles that are on in the rows of each kind
args = BundleTrainingConfig("out", forward=on, max_steps=20, learning_rate=2e-3)
BundleTrainer(model, args, objectives, tokenizer).train(resume_from_checkpoint=False)
model.save_pretrained("out/adapter")

prompt = tokenizer(["With ten"] * 3, return_tensors="pt")
alphas = {"b_cooking": [0, 1, 0], "b_sailing": [0, 0, 1]}  # by row: base model, cooking, sailing
ids = model.generate(**prompt, alphas=alphas, max_new_tokens=16, do_sample=False)
print(*tokenizer.batch_decode(ids), sep="\n")
