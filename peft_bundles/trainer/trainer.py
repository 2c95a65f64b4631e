"""`BundleTrainer`: several objectives on one model, each in its own bundles."""

from __future__ import annotations

import itertools
import math
import operator
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.trainer.base_trainer import _BaseTrainer

from ..config import BundleConfig
from ..core.walking import bundle_parameters
from ..objectives.base import Batch, Objective, Share
from ..objectives.forward import Forward, seeded
from ..objectives.kl_clamp import KLClamp
from ..routing.backward import routed_backward
from ..routing.reduction import finalize_grads, reduce_gradients, share_seen
from ..routing.routes import check_signals, routing_column
from . import monitor
from .checkpoint import CheckpointMixin
from .config import BundleTrainingConfig
from .logs import LogsMixin
from .mixing import MixingPlan
from .sharding import as_whole, fsdp_plugin, shard, zero_stage
from .tables import at_full_rate, forward_table, promises
from .topics import MARK, TopicsMixin, check_topics, topics_of
from .trunk import TrunkProjection, trunk_parameters


class _AroundOptimizer(TrainerCallback):
    """Tells the trainer when the weights are about to move and when they have."""

    def __init__(self, trainer: BundleTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._before_update()
        self.trainer._scale_rates()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._restore_rates()
        self.trainer._after_update()


class BundleTrainer(CheckpointMixin, LogsMixin, TopicsMixin, _BaseTrainer):
    """Train one bundled model with several objectives, every loss routed to the bundles that own its signal.

    Objectives whose losses need one backward share one forward and one backward; an objective with several routing
    columns takes one forward and one backward per distinct column. Which objectives a step has, which bundles are on
    in their rows, how gradients are clipped: `BundleTrainingConfig`.

    Args:
        model: from `get_peft_model(base, BundleConfig(...))`.
        args: a `BundleTrainingConfig`.
        objectives: with their datasets; names must differ.
        processing_class: the tokenizer.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: before anything is trained, for a dataset without the columns an objective needs, a signal that no
            bundle owns, a table that names what is not there.
    """

    _tag_names = ["bundles"]  # noqa: RUF012 - as trl has it
    _name = "Bundle"
    args: BundleTrainingConfig
    model: Any

    def __init__(
        self,
        model: PeftModel,
        args: BundleTrainingConfig,
        objectives: Objective | Sequence[Objective],
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        objectives = [objectives] if isinstance(objectives, Objective) else list(objectives)
        if wrong := next((o for o in objectives if not isinstance(o, Objective)), None):
            raise ValueError(f"objectives has a {type(wrong).__name__}; give objectives, e.g. [LM(rows)].")
        if not isinstance(args, BundleTrainingConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; give a BundleTrainingConfig, which takes its fields too."
            )
        names = [o.name for o in objectives]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"objectives are named {names}; give at least one, and each a name (signal=) of its own.")
        self.bundle_config = _bundle_config(model)
        self.objectives = {o.name: o for o in objectives}
        signals = {o.name: o.signals for o in objectives}
        for o in objectives:
            try:
                check_signals({"": self.bundle_config}, o.signals)
            except ValueError as error:
                raise ValueError(f"objective {o.name!r}: {error}") from None
        table = forward_table(self.bundle_config, signals, args.forward)
        self._check_names(args, names)
        self.plan = MixingPlan(names, args.mixing, args.mixing_weights, args.seed)
        self.clamp = KLClamp.from_config(args.kl_clamp, model, signals) if args.kl_clamp else None
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self.topics = topics_of(args.topics, self.bundle_config)
        for o in objectives:
            o.topics = self.topics
            o.setup(processing_class, model)
        penalties = [s for o in objectives for s in o.penalties]
        if loud := at_full_rate(self.bundle_config, penalties, args.lr_multipliers or {}):
            warnings.warn(
                f"bundle(s) {loud} are updated by the penalties {penalties} alone; Adam hides their coefficients, so "
                f"they learn at the full rate. Give them lr_multipliers, e.g. {{{loud[0]!r}: 0.01}}.",
                stacklevel=2,
            )
        trunk = trunk_parameters(model)
        if args.trunk == "full":
            for parameter in trunk.values():
                parameter.requires_grad_()
        self.trunk = TrunkProjection(trunk, args.trunk_ranks or {}, args.trunk_refresh)
        self._step_metrics: dict[str, Tensor] = {}
        self._metrics: dict[str, list[Tensor]] = {}
        self._tokens, self._since, self._micro = torch.zeros(()), 0.0, 0
        self._before: dict[str, list[Tensor]] | None = None
        self._rates: dict[str, float] = {}
        self._bundle_norms: dict[str, Tensor] = {}

        evaluated = {n: o.eval_rows for n, o in self.objectives.items() if o.eval_rows is not None}
        super().__init__(
            model=model,
            args=args,
            data_collator=operator.itemgetter(0),
            eval_dataset=cast(Any, evaluated or None),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _AroundOptimizer(self)],
            optimizers=optimizers,
        )
        self.zero_stage = zero_stage(args, self.accelerator)
        if self.zero_stage is not None and optimizers[0] is not None:
            raise ValueError("optimizers: under ZeRO the optimizer is that of the arguments (optim=); give none.")
        if self.is_deepspeed_enabled:
            as_whole(self.accelerator, args.mixed_precision)
            self.is_deepspeed_enabled = False
            if getattr(model, "quantization_method", None) is None and not self.is_model_parallel:
                model.to(args.device)  # the engine would have
        if (plugin := fsdp_plugin(args, self.accelerator)) is not None:
            if self.zero_stage is not None:
                raise ValueError("deepspeed and fsdp do not go together: take one of them.")
            shard(model, plugin, self.accelerator)
            as_whole(self.accelerator)
            self.is_fsdp_enabled = False  # what transformers would do for it is done: all that trains is whole
            trunk = trunk_parameters(model)  # sharding replaced them
            self.trunk = TrunkProjection(trunk, {}, args.trunk_refresh)
        check_topics(self.topics, objectives, plugin is not None)
        self.forward = Forward(model, signals, table, self.accelerator.autocast, self.topics)
        for o in objectives:
            if (head := o.head()) is not None:
                head.to(args.device)
        if self.is_world_process_zero():
            said = promises(self.bundle_config, signals, table)
            if any(p.requires_grad for p in trunk.values()):
                said = ["the trunk is trained: every objective moves it, and with it the reference (bundles off)."]
            if self.zero_stage is not None:
                said.append(
                    f"ZeRO-{self.zero_stage}: each of {args.world_size} processes has a part of the optimizer's state."
                )
            for line in said:
                print(f"[{self._name}] {line}", flush=True)

    def _check_names(self, args: BundleTrainingConfig, names: list[str]) -> None:
        bundles = list(self.bundle_config.bundles or ())
        signals = [s for o in self.objectives.values() for s in o.signals]
        for field, known in (
            ("rows", names),
            ("lr_multipliers", [*bundles, *names, "trunk"]),
            ("max_grad_norms", bundles),
            ("trunk_ranks", signals),
        ):
            if unknown := sorted(set(getattr(args, field) or {}) - set(known)):
                raise ValueError(f"{field} names {unknown}; known are {known}.")

    # ---- rows ----

    def share(self, name: str) -> Share:
        """This process's rows of an objective."""
        rows = (self.args.rows or {}).get(name, self.args.per_device_train_batch_size)
        accelerator = self.accelerator
        return Share(
            rows,
            self.args.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of micro-batches: the rows themselves are a function of the step (`Objective.batches`)."""
        steps = max(math.ceil(o.steps(self.share(n)) / self.plan.share(n)) for n, o in self.objectives.items())
        count = steps * self.args.gradient_accumulation_steps
        return DataLoader(cast(Any, range(count)), collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, {objective: batch}, each batch with its weight in the step.

        A weight is the micro-batch's part of the step's items (tokens, pairs) on all processes, so that neither
        accumulation nor the number of processes changes the gradient.
        """
        self._since = self._since or time.perf_counter()
        taken = len(list(itertools.islice(epoch_iterator, num_batches)))
        micro: list[dict[str, Batch]] = [{} for _ in range(taken)]
        step = self.state.global_step
        for name in self.plan.objectives(step) if taken else ():
            objective, share = self.objectives[name], self.share(name)
            batches = objective.batches(self.forward, self.plan.used(name, step), share)
            items = torch.stack([objective.items(b) for b in batches])
            total = items.sum()
            if share.world > 1:
                dist.all_reduce(total)
            if not total > 0:
                raise ValueError(
                    f"objective {name!r}: the rows of step {step} have no token to learn from; check token_weights "
                    "and max_length."
                )
            for target, batch, weight in zip(micro, batches, items / total * share.world):
                target[name] = {**batch, "weight": weight}
        self._note_rates(micro)
        return micro, None

    def floating_point_ops(self, inputs: dict[str, Batch]) -> float:
        """6 N per token, forward and backward; a frozen trunk saves a part of it."""
        return 6.0 * self.model.num_parameters() * sum(b["input_ids"].numel() for b in inputs.values())

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Batch], num_items_in_batch: Any = None) -> Tensor:
        """Forwards and backwards of one micro-batch; returns the sum of its losses."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        watched: dict[str, list[Tensor]] = {}
        for group in self._groups(inputs):
            rank = self.accelerator.process_index
            key = (self.args.seed, "forward", self.state.global_step, self._micro, rank, *group)
            with seeded(self.args.device, *key):
                if self._is_logging_step():
                    with monitor.watch(model, watched, spread=self.topics is not None):
                        losses = self._losses({name: inputs[name] for name in group})
                else:
                    losses = self._losses({name: inputs[name] for name in group})
            total += torch.stack([loss.detach().float() for loss in losses.values()]).sum()
            if self.topics is not None:  # no graph: all that the signal updates is off in rows without its topics
                losses = {signal: loss for signal, loss in losses.items() if loss.requires_grad}
            if self.trunk.ranks:
                self.trunk.backward(model, losses, self.state.global_step)
            else:
                routed_backward(model, losses)
        for name, values in watched.items():
            self._metrics.setdefault(name, []).append(torch.stack([v.float() for v in values]).mean())
        self._tokens = sum((b["attention_mask"].sum() for b in inputs.values()), self._tokens.to(total.device))
        self._micro += 1
        if self.accelerator.sync_gradients:
            self._micro = 0
            self._quieten(model)
            finalize_grads(model)
            reduce_gradients(self._head_parameters())
            for name, value in self._step_metrics.items():
                self._metrics.setdefault(name, []).append(value)
            self._step_metrics = {}
        return total

    def _quieten(self, model: Any) -> None:
        """The backward of `BundleModel.quiet_loss`, once a step, for the bundles that the step's losses update."""
        if self.topics is not None:
            share_seen(model)
        with seeded(self.args.device, self.args.seed, "quiet", self.state.global_step):
            loss = model.quiet_loss()
        if loss.requires_grad:
            loss.backward()
            self._note("loss/quiet", loss, torch.ones_like(loss))

    def _groups(self, inputs: Iterable[str]) -> list[list[str]]:
        """Objectives by the forward they share. Several backwards over shared rows would walk all of them each time."""
        configs = self.model.peft_config
        several = {n for n in inputs if len({routing_column(configs, s) for s in self.objectives[n].signals}) > 1}
        alone = several if self.args.shared_forward else set(inputs)
        shared = [n for n in inputs if n not in alone]
        return [g for g in (shared, *([n] for n in inputs if n in alone)) if g]

    def _losses(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Signal -> loss of a micro-batch, with its weight in the step; logs them on the way."""
        outputs = self.forward(batches)
        losses: dict[str, Tensor] = {}
        for name, batch in batches.items():
            found, metrics = self.objectives[name].losses(outputs[name], batch)
            if self.clamp is not None:
                for signal, penalty in self.clamp(self.forward, name, outputs[name], batch, metrics).items():
                    found[signal] = found[signal] + penalty
            for signal, loss in found.items():
                self._note(f"loss/{signal}" if name == signal else f"loss/{name}/{signal}", loss, batch["weight"])
                losses[signal] = losses.get(signal, 0) + loss * batch["weight"]
            for metric, value in metrics.items():
                self._note(f"{name}/{metric}", value, batch["weight"])
        return losses

    def _note(self, name: str, value: Tensor, weight: Tensor) -> None:
        self._step_metrics[name] = self._step_metrics.get(name, 0) + value.detach().float() * weight

    # ---- optimizer ----

    def _head_parameters(self) -> list[nn.Parameter]:
        heads = [o.head() for o in self.objectives.values()]
        return [p for head in heads if head is not None for p in head.parameters()]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group per learning rate and weight decay; every parameter in one group only."""
        if self.optimizer is not None:
            return self.optimizer
        factors = self.args.lr_multipliers or {}
        bundle_of = {id(p): name for (_, name), ps in bundle_parameters(self.model).items() for p in ps}
        decayed = set(self.get_decay_parameter_names(self.model))
        named = [(bundle_of.get(id(p), "trunk"), n, p, n in decayed) for n, p in self.model.named_parameters()]
        for name, objective in self.objectives.items():
            head = objective.head()
            named += [
                (name, f"{name}_head.{n}", p, p.dim() > 1)
                for n, p in (head.named_parameters() if head is not None else ())
            ]
        by_topic = self.topics.scaled() if self.topics is not None and self.topics.routing.mask == "rate" else ()
        groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
        for owner, _, parameter, decay in named:
            if parameter.requires_grad:
                rate, mark = float(factors.get(owner, 1.0)), owner if owner in by_topic else ""
                groups.setdefault((rate, self.args.weight_decay if decay else 0.0, mark), []).append(parameter)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        # Factor 1 first: the logged learning rate is that of the first group.
        self.optimizer = cls(
            [
                {"params": params, "weight_decay": decay, "lr": kwargs["lr"] * factor} | ({MARK: mark} if mark else {})
                for (factor, decay, mark), params in sorted(groups.items(), key=lambda g: (g[0][0] != 1.0, g[0]))
            ],
            **kwargs,
        )
        if self.zero_stage is not None:
            from .zero import ZeroOptimizer  # needs deepspeed

            names = {id(p): n for _, n, p, _ in named}
            owners = monitor.labels(self.model)
            owner_of = names | {id(p): owners[key] for key, ps in bundle_parameters(self.model).items() for p in ps}
            self.optimizer = ZeroOptimizer(cast(Any, self.optimizer), owner_of, names, self.zero_stage)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every bundle, the trunk and every head by itself; returns the norm of all before clipping."""
        names, limits = monitor.labels(model), self.args.max_grad_norms or {}
        parts = {names[key]: (ps, limits.get(key[1])) for key, ps in bundle_parameters(model).items()}
        parts["trunk"] = (list(self.trunk.parameters.values()), None)
        for name, objective in self.objectives.items():
            head = objective.head()
            parts[f"{name}_head"] = (list(head.parameters()) if head is not None else [], None)
        norms = {}
        for name, (parameters, limit) in parts.items():
            if any(p.grad is not None for p in parameters):
                limit = limit or self.args.max_grad_norm or math.inf
                norms[name] = nn.utils.clip_grad_norm_(parameters, limit)
        self._bundle_norms = norms
        return torch.stack([n.float() for n in norms.values()]).norm() if norms else torch.zeros(())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Several backwards under DDP leave ranks out of step without an error (facts in docs/decisions.md):
        # `finalize_grads` reduces, and the mark keeps accelerate from wrapping. Autocast is the forward's own.
        model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model


def _bundle_config(model: Any) -> BundleConfig:
    """The config of the active adapter.

    Raises:
        ValueError: the model has no bundles.
    """
    config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
    if not isinstance(config, BundleConfig):
        raise ValueError(f"{type(model).__name__} has no bundles; use get_peft_model(model, BundleConfig(...)).")
    return config
