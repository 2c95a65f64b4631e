"""What continual.py measures of a method: every task in every mode, text that nobody trains on, and how far it moved.

Exact match is by teacher forcing: greedy decoding gives the answer exactly when every token of it is the argmax after
the ones before. A judgement is right when P("Yes") against P("No") is on its side of a half. Only where the model
judges its own answers (`reflect`) it writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_bundles.calibration import plain_samples
from peft_bundles.core.base import CHILD
from studies.continual.data import JUDGE, TASKS, TEXT_TOKENS, Rows, chunks, encode, majority
from studies.continual.methods import Alphas, Lora, Method
from studies.measures.answers import f1
from studies.measures.code import human_eval_problems, pass_rate
from studies.quality.make_data import PROMPT
from studies.rows import tokens_of
from studies.training import autocast


ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
SHRINK = (0.1, 0.25, 0.5, 0.75, 0.9)
UNIFORM = dict.fromkeys(TASKS, 1 / len(TASKS))
ITEMS = 40  # a task, of the features
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "<|im_end|>")  # where a completed function ends


def alone(task: str) -> Alphas:
    return {t: float(t == task) for t in TASKS}


def of_probabilities(p: Tensor, truth: Tensor) -> dict[str, float]:
    """AUC (not where all are of one class) and Brier score of probabilities (N,) that `truth` (N,) holds."""
    p, found = p.double(), {}
    apart = p[truth][:, None] - p[~truth][None, :]
    if apart.numel():
        found["auc"] = ((apart.sign() + 1) / 2).mean().item()
    return found | {"brier": (p - truth.double()).square().mean().item()}


class Bench:
    """The tests of one model and one data file, encoded once.

    Args:
        base: the untouched model, to which distances are measured.
        data: as `data.load` returns it.
        common: the settings that all cells share.
    """

    def __init__(self, base: Any, tokenizer: Any, data: dict[str, Any], common: dict[str, Any]) -> None:
        self.base, self.tokenizer, self.data, self.common = base, tokenizer, data, common
        self.device = next(base.parameters()).device
        length, most = common["length"], common["test_items"]
        self.train = {task: [encode(tokenizer, item) for item in data["train"][task]] for task in TASKS}
        self.items = {split: {task: data[split][task][:most] for task in TASKS} for split in ("validation", "test")}
        if long := [t for items in self.train.values() for t, _ in items if len(t) > length]:
            raise ValueError(f"length: {length}, but {len(long)} training items are longer; prepare the data anew.")
        self.answers = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
        self.sets = {split: {task: self._rows(task, self.items[split][task]) for task in TASKS} for split in self.items}
        few = common["alpha_items"]
        self.sets["few"] = {task: self._rows(task, self.items["test"][task][:few]) for task in TASKS}
        rows = common["domain_rows"]
        self.domains = {
            name: [c.to(self.device) for c in chunks([tokens_of(tokenizer, t) for t in texts[:rows]], TEXT_TOKENS, 32)]
            for name, texts in data["domains"].items()
        }
        untouched = Method(base, {}, 0)
        self.base_states = {
            key: [self._states(untouched, part).float() for part in parts]
            for key, parts in {**self.sets["test"], **self.domains}.items()
        }
        right = {task: [p == task for p in data["tags"][task][:most]] for task in TASKS}
        self.tag_accuracy = {task: sum(found) / len(found) for task, found in right.items()}

    def _rows(self, task: str, items: Sequence[Sequence[str]], length: int | None = None) -> list[Rows]:
        encoded = [encode(self.tokenizer, item) for item in items]
        if task == "meta":  # the first token of the answer decides
            encoded = [(tokens[: first + 1], first) for tokens, first in encoded]
        return [part.to(self.device) for part in chunks(encoded, length or self.common["length"])]

    def _cast(self) -> Any:
        return autocast(self.device)

    @torch.no_grad()
    def _states(self, method: Method, rows: Rows) -> Tensor:
        """Final states (P, d) where something counts."""
        with self._cast():
            return method.trunk(rows.ids).flatten(0, 1)[rows.where]

    @torch.no_grad()
    def _logits(self, method: Method, states: Tensor) -> Tensor:
        with self._cast():
            return method.inner.get_output_embeddings()(states).float()

    def _yes(self, logits: Tensor) -> Tensor:
        """P("Yes") of the two answers of meta."""
        return logits[:, self.answers].softmax(-1)[:, 0]

    # ---- one state ----

    def score(self, method: Method, alphas: Alphas | None, split: str = "test") -> dict[str, dict[str, Any]]:
        """Of every task: "right" (N,) bools, for memory "f1" (N,), for meta "p" (N,) P("Yes"); on test, "moved"."""
        found: dict[str, dict[str, Any]] = {}
        with method.state(alphas):
            for task, parts in self.sets[split].items():
                right, scores, moved = [], [], [0.0, 0.0]
                for number, rows in enumerate(parts):
                    states = self._states(method, rows)
                    logits = self._logits(method, states)
                    if task == "meta":
                        p = self._yes(logits)
                        truth = rows.target == self.answers[0]
                        right.append((p > 0.5) == truth)
                        scores.append(p)
                    else:
                        said = logits.argmax(-1)
                        correct = torch.ones(len(rows.ids), dtype=torch.bool, device=self.device)
                        correct[rows.row[said != rows.target]] = False
                        right.append(correct)
                        if task == "memory":
                            scores.append(self._f1(rows, said))
                    if split == "test":
                        self._add_moved(moved, states, self.base_states[task][number])
                found[task] = {"right": torch.cat(right).cpu()}
                if scores:
                    found[task]["p" if task == "meta" else "f1"] = torch.cat(scores).cpu()
                if split == "test":
                    found[task]["moved"] = moved[0] / moved[1]
        return found

    def _f1(self, rows: Rows, said: Tensor) -> Tensor:
        """Word F1 of each row's answer, token by token the argmax after the right ones before."""
        row, predicted, wanted = rows.row.tolist(), said.tolist(), rows.target.tolist()
        texts: list[list[str]] = []
        for tokens in (predicted, wanted):
            lists: list[list[int]] = [[] for _ in rows.ids]
            for n, token in zip(row, tokens):
                lists[n].append(token)
            texts.append(self.tokenizer.batch_decode(lists, skip_special_tokens=True))
        return torch.tensor([f1([p], [w]) for p, w in zip(*texts)])

    @staticmethod
    def _add_moved(moved: list[float], states: Tensor, base: Tensor) -> None:
        moved[0] += float((states.float() - base).norm(dim=-1).sum())
        moved[1] += float(base.norm(dim=-1).sum())

    def text(self, method: Method, alphas: Alphas | None) -> tuple[dict[str, float], float]:
        """Mean token loss of every domain, and how far the final states moved on all of them."""
        losses, moved = {}, [0.0, 0.0]
        with method.state(alphas):
            for name, parts in self.domains.items():
                total = 0.0
                for number, rows in enumerate(parts):
                    states = self._states(method, rows)
                    self._add_moved(moved, states, self.base_states[name][number])
                    for few, target in zip(states.split(2048), rows.target.split(2048)):
                        total += float(F.cross_entropy(self._logits(method, few), target, reduction="sum"))
                losses[name] = total / sum(len(rows.target) for rows in parts)
        return losses, moved[0] / moved[1]

    # ---- what a record has ----

    def result(self, task: str, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy and "items", with F1 of memory, AUC and Brier score of meta."""
        right = scores["right"]
        found: dict[str, Any] = {"accuracy": right.float().mean().item()}
        if "f1" in scores:
            found["f1"] = scores["f1"].mean().item()
        if "p" in scores:
            truth = torch.tensor([item[1] == "Yes" for item in self.items["test"][task][: len(scores["p"])]])
            found |= of_probabilities(scores["p"], truth)
        return {k: round(v, 5) for k, v in found.items()} | {"items": "".join("01"[int(x)] for x in right)}

    def states(self, method: Method) -> dict[str, Alphas | None]:
        if not method.tagged:
            return {"all": None}
        return {"all": None, **{task: alone(task) for task in TASKS}, "uniform": UNIFORM}

    def measure(self, method: Method, last: bool, order: Sequence[str] = ()) -> dict[str, Any]:
        """The modes, each part alone, the domains' losses (all states after the last phase), and the distances.

        With an order of three tasks there is also the mode "prefix": a task's own part and those learnt before it.
        """
        scores = {state: self.score(method, alphas) for state, alphas in self.states(method).items()}
        modes = {"all": scores["all"]}
        if method.tagged:
            modes["tag"] = {task: scores[task][task] for task in TASKS}
            modes["uniform"] = scores["uniform"]
            modes["nearest"] = {task: self._nearest(task, scores) for task in TASKS}
        if order:
            two = self.score(method, {task: float(task != order[2]) for task in TASKS})
            modes["prefix"] = {t: s[t] for t, s in zip(order, (scores[order[0]], two, scores["all"]))}
        found: dict[str, Any] = {
            "modes": {m: {t: self.result(t, of[t]) for t in TASKS} for m, of in modes.items()},
        }
        if method.tagged:
            found["alone"] = {
                part: {t: round(scores[part][t]["right"].float().mean().item(), 5) for t in TASKS} for part in TASKS
            }
        texts = {s: self.text(method, a) for s, a in self.states(method).items() if last or s == "all"}
        found["domains"] = {s: {name: round(x, 5) for name, x in of.items()} for s, (of, _) in texts.items()}
        found["norms"] = {
            s: {**{t: round(scores[s][t]["moved"], 6) for t in TASKS}, "text": round(moved, 6)}
            for s, (_, moved) in texts.items()
        }
        return found

    def _nearest(self, task: str, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Each item with the part that was predicted from its prompt."""
        tags = self.data["tags"][task][: len(scores["all"][task]["right"])]
        names = [k for k in ("right", "f1", "p") if k in scores["all"][task]]
        return {k: torch.stack([scores[tag][task][k][n] for n, tag in enumerate(tags)]) for k in names}

    def validate(self, method: Method, mode: str) -> dict[str, float]:
        """Accuracy on validation items in the mode ("tag" or "all") by which the method is judged, and their mean."""
        if mode == "tag":
            scores = {task: self.score(method, alone(task), "validation")[task] for task in TASKS}
        else:
            scores = self.score(method, None, "validation")
        found = {task: scores[task]["right"].float().mean().item() for task in TASKS}
        return {k: round(v, 5) for k, v in {**found, "mean": sum(found.values()) / len(TASKS)}.items()}

    def sweep(self, method: Method) -> dict[str, Any]:
        """Every part's alpha, the others on and off: accuracy of every task on the first items."""
        seen: dict[tuple[float, ...], dict[str, Any]] = {}

        def at(alphas: Alphas) -> dict[str, Any]:
            key = tuple(alphas[t] for t in TASKS)
            if key not in seen:
                scores = self.score(method, alphas, "few")
                seen[key] = {t: self.result(t, scores[t]) for t in TASKS}
            return seen[key]

        return {
            name: {part: {str(a): at({**dict.fromkeys(TASKS, others), part: a}) for a in ALPHAS} for part in TASKS}
            for name, others in (("others_on", 1.0), ("others_off", 0.0))
        }

    @torch.no_grad()
    def reflect(self, method: Method) -> dict[str, Any]:
        """The model answers items of memory and logic, its own part on, and then judges its answers in meta's format.

        Task -> {"items", "accuracy" (exact match), "others_off" and "others_on": alpha of meta's part from 0 to 1 ->
        {"auc", "brier" of P("Yes"), "kept": the share that it calls right, "kept_accuracy": of those}}. A method
        without parts judges in the one state that it has, "others_on" at 1.
        """
        found: dict[str, Any] = {}
        for task in TASKS[:2]:
            all_of_them, few = self.items["test"][task], self.common["alpha_items"]
            few = min(few, len(all_of_them))
            items = [all_of_them[n * len(all_of_them) // few] for n in range(few)]  # of every family
            longest = max(len(tokens) - first for tokens, first in (encode(self.tokenizer, item) for item in items))
            prompts = [tokens_of(self.tokenizer, (PROMPT.format(item[0]), ""))[0] for item in items]
            texts = self._completed(method, alone(task) if method.tagged else None, prompts, longest)
            said = [text.split("<|im_end|>")[0].strip() for text in texts]
            right = torch.tensor([answer == item[1].strip() for answer, item in zip(said, items)])
            asked = [[JUDGE.format(item[0].strip(), answer), "Yes"] for answer, item in zip(said, items)]
            rows = self._rows("meta", asked, length=10**4)  # an answer may be longer than any that meta was taught
            found[task] = {"items": few, "accuracy": round(right.float().mean().item(), 5)}
            for name, others in (("others_off", 0.0), ("others_on", 1.0)):
                states: dict[float, Alphas | None] = {1.0: None} if others else {}
                if method.tagged:
                    states = {a: {**dict.fromkeys(TASKS, others), "meta": a} for a in ALPHAS if a <= 1}
                found[task][name] = {str(a): self._judged(method, state, rows, right) for a, state in states.items()}
        return found

    def _judged(self, method: Method, alphas: Alphas | None, rows: Sequence[Rows], right: Tensor) -> dict[str, float]:
        with method.state(alphas):
            p = torch.cat([self._yes(self._logits(method, self._states(method, part))) for part in rows]).cpu()
        kept = p > 0.5
        found = {**of_probabilities(p, right), "kept": kept.float().mean().item()}
        if kept.any():
            found["kept_accuracy"] = right[kept].float().mean().item()
        return {k: round(v, 5) for k, v in found.items()}

    def shrink(self, method: Method) -> list[dict[str, Any]]:
        """The LoRA times a factor, at several."""
        assert isinstance(method, Lora)
        found = []
        for factor in SHRINK:
            with method.shrunk(factor):
                found.append({"scale": factor, **self.measure(method, True)})
        return found

    def about(self) -> dict[str, Any]:
        """What the base record says of the data."""
        return {
            "items": {task: [item[2] for item in self.items["test"][task]] for task in TASKS},
            "majority": {task: majority(self.items["test"][task]) for task in TASKS},
            "counts": {
                split: {task: len(self.data[split][task]) for task in TASKS} for split in ("train", *self.items)
            },
            "tag": "TF-IDF of words and logistic regression, fitted on the training prompts",
        }

    # ---- hidden states, code, samples ----

    @torch.no_grad()
    def features(self, method: Method, path: Path) -> None:
        """Pooled states of test prompts at three depths, and what each bundle adds there, as float16 in an .npz."""
        prompts = [
            tokens_of(self.tokenizer, (PROMPT.format(item[0]), ""))[0]
            for task in TASKS
            for item in self.items["test"][task][:ITEMS]
        ]
        counts = [len(self.items["test"][task][:ITEMS]) for task in TASKS]
        blocks = method.inner.model.layers
        depths = sorted({round(len(blocks) * share) - 1 for share in (0.3, 0.6, 0.9)})
        states: dict[str, list[list[Tensor]]] = {}

        def pool(name: str, place: int, hidden: Tensor, mask: Tensor) -> None:
            last = hidden[torch.arange(len(mask)), mask.sum(1) - 1]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for kind, value in (("last", last), ("mean", mean)):
                states.setdefault(f"{name}_{kind}", [[] for _ in depths])[place].append(value.float().cpu())

        for start in range(0, len(prompts), 60):
            part = prompts[start : start + 60]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            for n, tokens in enumerate(part):
                ids[n, : len(tokens)] = torch.tensor(tokens)
            lengths = torch.tensor([len(tokens) for tokens in part])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(self.device)
            with method.state(None), self._cast(), _outputs([blocks[d] for d in depths]) as (into, out):
                method.trunk(ids.to(self.device))
            for place, depth in enumerate(depths):
                pool("hidden", place, out[place].float(), mask)
                layer = getattr(blocks[depth], CHILD, None)
                for task in TASKS if layer is not None and method.tagged else ():
                    with method.state(alone(task)), self._cast():
                        pool(f"delta_{task}", place, layer(into[place]).float() - into[place].float(), mask)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.stack([torch.cat(x) for x in of]).numpy() for name, of in states.items()}
        np.savez_compressed(
            path,
            depths=np.array(depths),
            task=np.repeat(np.arange(len(TASKS)), counts),
            **{name: array.astype(np.float16) for name, array in arrays.items()},
        )

    @torch.no_grad()
    def code(self, method: Method, problems: int) -> dict[str, Any]:
        """pass@1 of greedy completions of the first so many problems of HumanEval, all parts on."""
        chosen = dict(list(human_eval_problems().items())[:problems])
        tokens = [
            self.tokenizer(p["prompt"].rstrip() + "\n", add_special_tokens=False)["input_ids"] for p in chosen.values()
        ]
        texts = self._completed(method, None, tokens, 160)
        ended = [text[: min([text.find(s) for s in STOPS if s in text] or [len(text)])] for text in texts]
        return {**pass_rate({name: [text] for name, text in zip(chosen, ended)}), "tasks": len(chosen)}

    def _completed(self, method: Method, alphas: Alphas | None, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        """What greedy decoding adds to the prompts, at most so many tokens."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(prompts):
            ids[n, width - len(row) :], mask[n, width - len(row) :] = torch.tensor(row), 1
        with method.state(alphas), self._cast():
            made = method.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return self.tokenizer.batch_decode(made[:, width:])

    @torch.no_grad()
    def samples(self, rows: int, tokens: int) -> list[str]:
        """Texts that the base model writes by itself at temperature 1, half of them after a user's turn begins."""
        texts = []
        torch.manual_seed(0)
        for start in ("<|endoftext|>", "<|im_start|>user\n"):
            prompt = torch.tensor([self.tokenizer(start, add_special_tokens=False)["input_ids"]], device=self.device)
            with self._cast():
                made = plain_samples(self.base, prompt.expand(-(-rows // 2), -1), max(tokens, prompt.shape[1] + 1))
            texts.append(self.tokenizer.batch_decode(made))
        return [text for pair in zip(*texts) for text in pair][:rows]


@contextmanager
def _outputs(blocks: Sequence[Any]) -> Any:
    """What each block's bundles are given (of a block without, what it returns), and what the block returns."""
    into: list[Any] = [None] * len(blocks)
    out: list[Any] = [None] * len(blocks)
    handles = []
    for n, block in enumerate(blocks):

        def after(module: Any, args: Any, output: Any, n: int = n) -> None:
            out[n] = output[0] if isinstance(output, tuple) else output

        def before(module: Any, args: Any, n: int = n) -> None:
            into[n] = args[0]

        handles.append(block.register_forward_hook(after))
        if (layer := getattr(block, CHILD, None)) is not None:
            handles.append(layer.register_forward_pre_hook(before))
    try:
        yield into, out
    finally:
        for handle in handles:
            handle.remove()
