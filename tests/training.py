"""What tests of the trainer share: a tokenizer of characters, tiny data in TRL's formats, a model, arguments."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import BOS, EOS, PAD, TINY, VOCABULARY, perturb
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from peft_bundles import BundleConfig, calibrate
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.objectives import PPO
from peft_bundles.objectives.tokens import Sampling
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
LETTERS = [chr(c) for c in range(32, 127)][: VOCABULARY - 4]


def tokenizer(letters: Sequence[str] = LETTERS) -> PreTrainedTokenizerFast:
    """One id a character; "<pad>", "<bos>", "<eos>" and "<unk>" are the ids of `models.py`."""
    names = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": 3}
    core = Tokenizer(models.WordLevel({**names, **{c: i + 4 for i, c in enumerate(letters)}}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def texts(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": f"the {i} cats sit on mat {i * 7 % 11}"} for i in range(count)]


def completions(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}"} for i in range(count)]


def pairs(count: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}:", "chosen": f"yes {i}", "rejected": "no" + "o" * (i % 3)} for i in range(count)]


def chat(role_text: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in role_text]


def config(**fields: Any) -> BundleConfig:
    """A bundle for text, one for preferences, and four for reinforcement learning."""
    own = lambda *signals: {"rank": 6, "sub_bases": ["a"], "signals": dict.fromkeys(signals, 1.0), "role": "signal"}  # noqa: E731
    defaults: dict[str, Any] = {
        "sub_bases": {"a": 24, "b": 16},
        "bottleneck": 1.0,
        "bundles": {
            "b_lm": {"rank": 8, "sub_bases": ["a"], "signals": {"lm": 1.0, "logic": 1.0}},
            "b_preference": {"rank": 8, "sub_bases": ["b"], "signals": {"preference": 1.0}, "role": "signal"},
            "b_policy": own("policy"),
            "b_value": own("value"),
            "b_entropy": own("entropy"),
            "b_kl": own("kl"),
        },
        "task_type": "CAUSAL_LM",
    }
    return BundleConfig(**{**defaults, **fields})


def everywhere() -> dict[str, Any]:
    """The bundles of `config`, and some at linear layers; no objective has the signal of the last."""
    rest = {"place": ["o_proj", "down_proj"], "kind": "mlp", "signals": {"preference": 1.0, "policy": 0.5}}
    return {
        **(config().bundles or {}),
        "l_lm": {"rank": 3, "place": "mlp", "signals": {"lm": 1.0}},
        "l_rest": {"rank": 2, **rest},
        "l_idle": {"rank": 2, "place": "mlp", "signals": {"temporal": 1.0}},
    }


def model(name: str = "llama", *, moved: bool = True, calibrated: bool = False, **fields: Any) -> PeftModel:
    """Calibrated, the loss of every step includes the quiet penalty."""
    made = get_peft_model(TINY[name](), config(**fields))
    if calibrated:
        calibrate(made, tokens=1024, max_length=64, progress=False)
    return perturb(made, scale=0.1) if moved else made  # type: ignore[return-value]


def arguments(folder: Path, **fields: Any) -> BundleTrainingConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return BundleTrainingConfig(**{**defaults, **fields})


def trainer(
    folder: Path, objectives: Any, on: PeftModel | None = None, tokens: Any = None, **fields: Any
) -> BundleTrainer:
    return BundleTrainer(on or model(), arguments(folder, **fields), objectives, tokens or tokenizer())


class Greedy(Sampling):
    def options(self) -> dict[str, Any]:
        return {"do_sample": False}


def greedy(objective: PPO) -> PPO:
    """The objective with rollouts that do not depend on the rows beside them, for comparisons."""
    objective.sampling = Greedy()
    return objective


def bundles_of(found: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Bundle -> copies of its weights."""
    return {name: [p.detach().clone() for p in ps] for (_, name), ps in bundle_parameters(found).items()}


class Watch(TrainerCallback):
    """Which bundles each step moved by a bit or more."""

    def __init__(self, run: BundleTrainer) -> None:
        self.run, self.seen = run, [bundles_of(run.model)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(bundles_of(self.run.model))

    def moved(self) -> list[set[str]]:
        return [
            {name for name in a if not all(map(torch.equal, a[name], b[name]))}
            for a, b in itertools.pairwise(self.seen)
        ]


def losses_of(run: BundleTrainer, prefix: str = "loss/") -> list[dict[str, float]]:
    """The logged losses, a step each."""
    steps = [{k: v for k, v in entry.items() if k.startswith(prefix)} for entry in run.state.log_history]
    return [s for s in steps if s]


def _started(rank: int, work: Callable[[int, str], None], folder: str, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    work(rank, folder)
    dist.destroy_process_group()


def two_processes(work: Callable[[int, str], None], folder: Path) -> tuple[Any, Any]:
    """Run work(rank, folder) in two processes on the CPU; what each has saved as folder/<rank>.pt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(_started, args=(work, str(folder), port), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return first, second
