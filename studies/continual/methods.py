"""The methods that continual.py compares, each at the same number of trainable parameters.

A method says what an optimizer moves in a phase (`begin`), computes one step's gradients (`gradients`), and puts itself
into a state to test (`state`): which of its tagged parts are on, and how far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_bundles import BundleConfig, calibrate
from peft_bundles.core.basis import bundle_shapes
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.trainer.trunk import TrunkProjection, trunk_parameters
from studies.continual.data import TASKS
from studies.quality.methods import kl_to_base
from studies.rows import Rows
from studies.training import final_states, row_loss


Alphas = dict[str, float]  # task -> how far its part is on
Group = tuple[list[nn.Parameter], float]  # parameters that are clipped together, and the factor of their rate


# ---- equal budgets ----


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The decoder blocks' linear layers: name -> (outputs, inputs). The head is none of them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: tuple(m.weight.shape)  # type: ignore[misc]
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head
    }


def lora_size(model: nn.Module, rank: int) -> int:
    """Trainable parameters of a LoRA of that rank on all of `linears`."""
    return sum(rank * (rows + columns) for rows, columns in linears(model).values())


def match_budget(unit: int, budget: int, what: str = "size") -> int:
    """How many units of `unit` parameters (a rank, a hidden unit) come closest to the budget.

    Raises:
        ValueError: the closest is more than 5% away.
    """
    size = max(1, round(budget / unit))
    if abs(size * unit - budget) > 0.05 * budget:
        raise ValueError(
            f"{what}: {size} x {unit} parameters is {size * unit / budget - 1:+.1%} from the budget of {budget}; "
            "at most 5% is allowed. Take another budget_rank."
        )
    return size


# ---- what all have in common ----


class Method:
    """Full fine-tuning; and the base of the others.

    Attributes:
        tagged: it has a part for every task.
        general: the penalty on what it makes of general text, if its condition has one (`kl`).
    """

    tagged = False
    general: Callable[[], Tensor] | None = None

    def __init__(self, base: nn.Module, options: dict[str, Any], seed: int) -> None:
        self.options, self.seed = options, seed
        self.model: Any = copy.deepcopy(base)
        self.inner: Any = self.model
        self.model.requires_grad_(type(self) is Method)

    def trained(self) -> list[nn.Parameter]:
        """All parameters that some phase trains."""
        return list(self.model.parameters())

    def begin(self, phase: int, tags: Sequence[str]) -> list[Group]:
        """Before a phase: `tags` are those of a step's rows, equal ones together."""
        return [(self.trained(), 1.0)]

    def training(self) -> Any:
        """The context of a phase's steps."""
        return nullcontext()

    def trunk(self, ids: Tensor) -> Tensor:
        """Final hidden states (N, T, d)."""
        return final_states(self.inner, ids)

    def states_of_step(self, ids: Tensor) -> Tensor:
        return self.trunk(ids)

    def extra(self) -> Tensor | None:
        """What is added to the loss."""
        return None if self.general is None else self.general()

    def gradients(self, batch: Rows, cast: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Forward (inside `cast()`) and backward of one step; the loss and what was added to it."""
        with cast():
            states = self.states_of_step(batch.ids).flatten(0, 1)[batch.where]
            logits = self.inner.get_output_embeddings()(states)
            loss = row_loss(logits, batch)
            extra = self.extra()
        self.backward(loss if extra is None else loss + extra)
        return loss.detach(), torch.zeros_like(loss) if extra is None else extra.detach().float()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def state(self, alphas: Alphas | None) -> Any:
        """Context to test in: parts on by `alphas`; None is everything on."""
        return nullcontext()


class Lora(Method):
    """One LoRA on all linear layers of the blocks (PEFT's), alpha twice the rank."""

    def __init__(self, base: nn.Module, options: dict[str, Any], seed: int) -> None:
        super().__init__(base, options, seed)
        rank = match_budget(lora_size(base, 1), options["budget"], "LoRA's rank")
        self.model = get_peft_model(self.inner, _lora(base, rank))
        self.own = [p for p in self.model.parameters() if p.requires_grad]
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self.scaling = self.layers[0].scaling["default"]

    def trained(self) -> list[nn.Parameter]:
        return self.own

    @contextmanager
    def shrunk(self, factor: float) -> Iterator[None]:
        """All of what it adds to the weights, times a factor."""
        for layer in self.layers:
            layer.scaling["default"] = self.scaling * factor
        try:
            yield
        finally:
            for layer in self.layers:
                layer.scaling["default"] = self.scaling


def _lora(base: nn.Module, rank: int) -> LoraConfig:
    targets = sorted({name.rpartition(".")[2] for name in linears(base)})
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


class Adapters(Method):
    """A LoRA of a third of the budget for each task: separate ones with a tag, or O-LoRA's.

    O-LoRA (Wang et al. 2023, arXiv 2310.14152): in a phase the LoRAs of the phases before stay on and are frozen, the
    new one learns with a penalty on what its rows have in common with theirs (`common_rows`); tested with all on.
    """

    tagged = True

    def __init__(self, base: nn.Module, options: dict[str, Any], seed: int) -> None:
        super().__init__(base, options, seed)
        rank = match_budget(lora_size(base, len(TASKS)), options["budget"], "each LoRA's rank")
        self.orthogonal: float | None = options.get("orthogonal")
        self.tagged = self.orthogonal is None
        self.model = get_peft_model(self.inner, _lora(base, rank), adapter_name=TASKS[0])
        for task in TASKS[1:]:
            self.model.add_adapter(task, _lora(base, rank))
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self.own = {
            task: [layer_part[task].weight for m in self.layers for layer_part in (m.lora_A, m.lora_B)]
            for task in TASKS
        }
        self.scaling = self.layers[0].scaling[TASKS[0]]
        self.before: list[str] = []
        self.now = ""

    def trained(self) -> list[nn.Parameter]:
        return [p for parameters in self.own.values() for p in parameters]

    def begin(self, phase: int, tags: Sequence[str]) -> list[Group]:
        self.runs = [(tag, tags.count(tag)) for tag in dict.fromkeys(tags)]
        if self.orthogonal is not None:
            self.before += [self.now] if self.now else []
            self.now = tags[0]
            self.switch(dict.fromkeys([*self.before, self.now], 1.0))
        learning = [tag for tag, _ in self.runs]
        for task, parameters in self.own.items():
            for parameter in parameters:
                parameter.requires_grad_(task in learning)
        return [(self.own[tag], 1.0) for tag in learning]

    def states_of_step(self, ids: Tensor) -> Tensor:
        if self.orthogonal is not None:
            return self.trunk(ids)
        parts = ids.split([rows for _, rows in self.runs])
        return torch.cat([self.trunk(part) for _, part in zip(self.one_by_one(), parts)])

    def one_by_one(self) -> Iterator[str]:
        """Each tag of the phase, while its adapter is the one that is on."""
        for tag, _ in self.runs:
            self.switch({tag: 1.0})
            yield tag
        for tag, _ in self.runs:  # PEFT freezes what is not active; the backward is still to come
            for parameter in self.own[tag]:
                parameter.requires_grad_(True)

    def extra(self) -> Tensor | None:
        if self.general is not None:
            return torch.stack([self.general() for _ in self.one_by_one()]).sum()
        if not self.orthogonal or not self.before:
            return None
        pairs = [(m.lora_A[old].weight, m.lora_A[self.now].weight) for m in self.layers for old in self.before]
        return self.orthogonal * common_rows(pairs)

    def switch(self, alphas: Alphas) -> None:
        """Make the adapters with an alpha that is not 0 active, scaled by it."""
        on = [task for task, alpha in alphas.items() if alpha] or [TASKS[0]]
        for layer in self.layers:
            layer.set_adapter(on)
            for task in TASKS:
                layer.scaling[task] = self.scaling * alphas.get(task, 0.0)

    @contextmanager
    def state(self, alphas: Alphas | None) -> Iterator[None]:
        if alphas is None:  # O-LoRA has those of the phases so far; untrained ones add nothing
            alphas = dict.fromkeys(TASKS, 1.0)
        self.switch(alphas)
        yield
        if self.orthogonal is not None:
            self.switch(dict.fromkeys([*self.before, self.now], 1.0))
        else:
            self.switch(dict.fromkeys(TASKS, 1.0))


def common_rows(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over pairs of |A_old A_new^T|, A (r, d) each: 0 exactly where every row of one is orthogonal to the other's.

    The loss of O-LoRA (arXiv 2310.14152, equation 8, with the absolute values of its published code). A_old gets no
    gradient.
    """
    total = pairs[0][1].new_zeros(())
    with torch.autocast(total.device.type, enabled=False):
        for size in {new.shape for _, new in pairs}:  # few large kernels, not one a layer
            old, new = (torch.stack([p[side] for p in pairs if p[1].shape == size]) for side in (0, 1))
            total = total + (old.detach() @ new.transpose(1, 2)).abs().sum()
    return total


class OSF(Method):
    """PEFT's OSF: the smallest singular directions of every weight learn, in the complement of the large ones.

    Between phases the weights are merged and decomposed anew, so that what was learnt and grew large is protected.
    """

    def __init__(self, base: nn.Module, options: dict[str, Any], seed: int) -> None:
        super().__init__(base, options, seed)
        self.ranks = {}
        rank = match_budget(lora_size(base, 1), options["budget"], "OSF's rank")
        for name, shape in linears(base).items():
            if min(shape) <= rank:
                raise ValueError(f"budget_rank: OSF's rank {rank} leaves nothing of {name} {shape} to protect.")
            self.ranks[name.rpartition(".")[2]] = min(shape) - rank
        self.attach()

    def attach(self) -> None:
        config = OSFConfig(
            effective_rank=max(self.ranks.values()),
            rank_pattern=self.ranks,
            target_modules=sorted(self.ranks),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(self.inner, config)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def begin(self, phase: int, tags: Sequence[str]) -> list[Group]:
        if phase:
            with torch.no_grad():
                self.inner = self.model.merge_and_unload()
            self.attach()
        return super().begin(phase, tags)


class Bundles(Method):
    """The package's bundles, one for each task, at its present defaults.

    Options: routed (a row's tag says whose bundle it updates; else all), forward ("owners": in a training row only the
    tag's bundle is on; "all"; "dropout": each bundle is on in every other row), support ("own" columns of the basis,
    "half" of them common, "one" bundle with all of them, "full": no projector), trunk_lr (the blocks' own weights learn
    too, at this rate), trunk_rank (each signal's updates of them in a subspace of that rank), quiet (another weight of
    the penalty on what bundles add to general text).
    """

    tagged = True

    def __init__(
        self, base: nn.Module, options: dict[str, Any], seed: int, texts: Sequence[str], tokenizer: Any
    ) -> None:
        super().__init__(base, options, seed)
        self.one = options.get("support") == "one"
        self.tagged = not self.one
        self.names = {task: "b_all" if self.one else f"b_{task}" for task in TASKS}
        self.model = get_peft_model(self.inner, bundle_config(base, options, seed))
        tokens = options["calibration"]["tokens"]
        calibrate(self.model, texts, tokenizer, tokens=tokens, max_length=128, batch_size=32, progress=False)
        self.own = {name: parameters for (_, name), parameters in bundle_parameters(self.model).items()}
        self.blocks: dict[str, nn.Parameter] = {}
        self.projection: TrunkProjection | None = None
        if options.get("trunk_lr"):
            inside = [id(p) for m in self.inner.model.layers for p in m.parameters()]
            self.blocks = {n: p for n, p in trunk_parameters(self.model).items() if id(p) in inside}
            for parameter in self.blocks.values():
                parameter.requires_grad_(True)
        if options.get("trunk_rank"):
            self.projection = TrunkProjection(self.blocks, dict.fromkeys(TASKS, options["trunk_rank"]), 10**9)
        self.tags: list[str] = []

    def trained(self) -> list[nn.Parameter]:
        return [p for parameters in self.own.values() for p in parameters] + list(self.blocks.values())

    def begin(self, phase: int, tags: Sequence[str]) -> list[Group]:
        self.tags = list(tags)
        routed = self.options.get("routed", True) and not self.one
        learning = [self.names[tag] for tag in dict.fromkeys(tags)] if routed else list(self.own)
        trunk = [(list(self.blocks.values()), self.options["trunk_lr"] / self.options["lr"])] if self.blocks else []
        return [(self.own[name], 1.0) for name in learning] + trunk

    @contextmanager
    def training(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.model.route(self.tags if len(set(self.tags)) > 1 else self.tags[0]))
            forward = self.options.get("forward", "owners")
            rows = {}
            if forward == "owners" and not self.one:
                rows = {task: [float(tag == task) for tag in self.tags] for task in TASKS}
            elif forward == "dropout":
                rows = {task: [float(n >> bit & 1) for n in range(len(self.tags))] for bit, task in enumerate(TASKS)}
            if rows:
                device = next(self.model.parameters()).device
                numbers: dict[str, Any] = {
                    self.names[task]: on[0] if len(set(on)) == 1 else torch.tensor(on, device=device)
                    for task, on in rows.items()
                }
                stack.enter_context(self.model.alphas(numbers))
            yield

    def extra(self) -> Tensor | None:
        quiet = self.model.quiet_loss()
        return quiet if self.general is None else quiet + self.general()

    def backward(self, loss: Tensor) -> None:
        if self.projection is None:
            loss.backward()
        else:
            self.projection.backward(self.model, {self.tags[0]: loss}, 0)
        self.model.finalize_grads()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """With a projection what AdamW moves is projected too: its division by elements leaves the subspace that the
        gradient was in."""
        if self.projection is None:
            optimizer.step()
            return
        before = {name: parameter.detach().clone() for name, parameter in self.blocks.items()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in self.blocks.items():
                if (p := self.projection.projectors.get((self.tags[0], name))) is not None:
                    tall = parameter.shape[0] > parameter.shape[1]
                    moved = parameter - before[name]
                    held = (p @ (p.T @ moved.T)).T if tall else p @ (p.T @ moved)
                    parameter.copy_(before[name] + held)

    @contextmanager
    def state(self, alphas: Alphas | None) -> Iterator[None]:
        given = {} if alphas is None or self.one else {self.names[t]: alphas.get(t, 0.0) for t in TASKS}
        with self.model.alphas(given), self.model.folded():  # folded once, for all test rows
            yield


def bundle_config(base: nn.Module, options: dict[str, Any], seed: int) -> BundleConfig:
    """Bundles on 3/4 of each layer's basis, their hidden units by the budget.

    Raises:
        ValueError: an unknown support; no size within 5% of the budget.
    """
    support, routed = options.get("support", "own"), options.get("routed", True)
    quarter, half = 0.25, 0.125
    kinds: dict[str, tuple[dict[str, float], dict[str, dict[str, Any]]]] = {
        "own": (dict.fromkeys(TASKS, quarter), {t: {"rank": quarter, "sub_bases": [t]} for t in TASKS}),
        "half": (
            {"common": half, **dict.fromkeys(TASKS, half)},
            {t: {"rank": half, "sub_bases": [t, "common"]} for t in TASKS},
        ),
        "full": ({}, {t: {"rank": quarter, "adapter": "full"} for t in TASKS}),
        "one": ({"main": 0.75}, {"all": {"rank": 0.75, "sub_bases": ["main"]}}),
    }
    if support not in kinds:
        raise ValueError(f"support={support!r} is unknown; choose one of {', '.join(kinds)}.")
    sub_bases, bundles = kinds[support]

    def made(hidden: int) -> BundleConfig:
        return BundleConfig(
            sub_bases=sub_bases,
            bundles={
                f"b_{name}": {
                    **spec,
                    "bottleneck": hidden,
                    "signals": {name: 1.0} if routed and support != "one" else dict.fromkeys(TASKS, 1.0),
                }
                for name, spec in bundles.items()
            },
            basis_seed=seed,
            **({"quiet": options["quiet"]} if "quiet" in options else {}),
            task_type="CAUSAL_LM",
        )

    d = base.config.hidden_size  # type: ignore[union-attr]
    width = sum(shape.width for shape in bundle_shapes(made(1), d).values())
    unit = 2 * width * base.config.num_hidden_layers  # type: ignore[union-attr,operator]
    return made(match_budget(unit, options["budget"], "the bundles' hidden units"))


METHODS: dict[str, Callable[..., Method]] = {
    "full": Method,
    "lora": Lora,
    "adapters": Adapters,
    "osf": OSF,
    "bundles": Bundles,
}


def build(base: nn.Module, options: dict[str, Any], seed: int, texts: Sequence[str], tokenizer: Any) -> Method:
    """A copy of the base with `options["method"]` on it; `options["budget"]` is the number of trainable parameters.

    Raises:
        ValueError: an unknown method; no size within 5% of the budget.
    """
    if options["method"] not in METHODS:
        raise ValueError(f"method: {options['method']!r} is unknown; choose one of {', '.join(METHODS)}.")
    torch.manual_seed(seed)
    given = (texts, tokenizer) if options["method"] == "bundles" else ()
    method = METHODS[options["method"]](base, options, seed, *given)
    if options.get("kl"):
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"] + [0]]
        length, tokens = 64, min(len(ids), options["calibration"]["tokens"])
        rows = torch.tensor(ids[: tokens // length * length]).view(-1, length)
        device = next(base.parameters()).device
        method.general = kl_to_base(method.inner, base, rows.to(device), options["kl"])
    return method
