"""`BundleTrainer`: several objectives on one model, each in its own bundles."""

from __future__ import annotations

import itertools
import logging
import math
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl.trainer.base_trainer import _BaseTrainer

from ..core.walking import state_of
from ..objectives.base import Objective
from ..objectives.batches import Batch, Share
from ..objectives.forward import Forward
from ..objectives.kl_clamp import KLClamp
from ..objectives.seeding import seeded
from ..routing.backward import routed_backward
from ..routing.reduction import finalize_grads, reduce_gradients, share_seen
from ..routing.routes import routing_column
from . import checks, monitor
from .checkpoint import STAGING, RunState, comparable, staged
from .config import BundleTrainingConfig
from .evaluating import held_out_means
from .keys import KeysAtEnd
from .mixing import MixingPlan
from .parameters import clip_gradients, head_parameters, optimizer_groups, start_alike
from .progress import shorten_console, without_bars
from .run_log import RunLog
from .sharding import fsdp_plugin, shard, treat_as_whole
from .tables import at_full_rate, company, forward_table, promises
from .topics import TopicRates, check_topics, topics_of
from .trunk import TrunkProjection, trunk_parameters


logger = logging.getLogger(__name__)


class BundleTrainer(_BaseTrainer):
    """Train one bundled model with several objectives. Every loss updates only the bundles that own its signal.

    Objectives whose losses need one backward share one forward and one backward. An objective with several routing
    columns (PPO's losses have several) takes one forward, and one backward for each distinct column.
    `BundleTrainingConfig` sets which objectives a step has, which bundles are on in their rows, and how gradients are
    clipped.

    The log has every loss ("loss/<signal>"), the objectives' own metrics, and for every bundle its alpha, the size of
    what it writes ("activation/<bundle>", as a part of the hidden state's norm), of its gradient and of its update
    ("grad_norm/", "update_norm/"). The console shows transformers' progress bar and the log without the numbers of each
    bundle. `promises()` says what the run guarantees.

    Args:
        model: from `get_peft_model(base, BundleConfig(...))`.
        args: a `BundleTrainingConfig`.
        objectives: one or several, with their datasets; their names must differ.
        processing_class: the tokenizer.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: before anything is trained, if a dataset lacks columns that its objective needs, no bundle owns a
            signal, or a setting names an objective, signal or bundle that does not exist.

    Example:
        A tokenizer whose tokens are the characters "a" to "t", a base model of random weights, and two steps:

        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback
        >>> from peft_bundles import BundleConfig
        >>> from peft_bundles.objectives import LM
        >>> ids = {token: number for number, token in enumerate(["<eos>", *"abcdefghijklmnopqrst"])}
        >>> letters = Tokenizer(models.WordLevel(ids, "<eos>"))
        >>> letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=21))
        >>> bundles = {name: {"rank": 8, "sub_bases": ["u"], "signals": {signal: 1.0}}
        ...     for name, signal in (("b_text", "lm"), ("b_other", "logic"))}
        >>> config = BundleConfig(bundles=bundles, sub_bases={"u": 16}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = BundleTrainingConfig(folder, max_steps=2, logging_steps=1, learning_rate=1e-2, use_cpu=True,
        ...         report_to="none", save_strategy="no", disable_tqdm=True)
        ...     trainer = BundleTrainer(model, args, LM([{"text": "abcabc"}]), tokenizer)
        ...     _ = trainer.remove_callback(PrinterCallback)
        ...     _ = trainer.train()
        >>> first = trainer.state.log_history[0]
        >>> "loss/lm" in first, first["update_norm/b_text"] > 0, first["update_norm/b_other"]
        (True, True, 0.0)
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
        checks.check_arguments(args)
        self.bundle_config = checks.config_of(model)
        self.objectives = checks.objectives_by_name(objectives, self.bundle_config)
        signals = {name: objective.signals for name, objective in self.objectives.items()}
        table = forward_table(self.bundle_config, signals, args.forward)
        checks.check_names(args, self.bundle_config, signals)
        self.plan = MixingPlan(list(signals), args.mixing, args.mixing_weights, args.seed)
        self.clamp = KLClamp.from_config(args.kl_clamp, model, signals) if args.kl_clamp else None
        processing_class = checks.tokenizer_of(processing_class)
        self.topics = topics_of(args.topics, self.bundle_config)
        self.topic_rates = TopicRates(self.topics, signals)
        for objective in self.objectives.values():
            objective.topics = self.topics
            with without_bars():
                objective.setup(processing_class, model)
        checks.check_held_out(args, self.objectives)
        checks.warn_of_weak_penalty(model, self.bundle_config)
        penalties = [s for objective in self.objectives.values() for s in objective.penalties]
        if loud := at_full_rate(self.bundle_config, penalties, args.lr_multipliers or {}):
            warnings.warn(
                f"bundle(s) {loud} are updated by the penalties {penalties} alone. Adam's step does not depend on a "
                "loss's coefficient, so they learn at the full rate. Give them lr_multipliers, e.g. "
                f"{{{loud[0]!r}: 0.01}}.",
                stacklevel=2,
            )
        trunk = trunk_parameters(model)
        if args.trunk == "full":
            for parameter in trunk.values():
                parameter.requires_grad_()
        self.trunk = TrunkProjection(trunk, args.trunk_ranks or {}, args.trunk_refresh)
        self.run_log = RunLog()
        self._micro = 0  # number of the micro-batch in the current step
        self._saving = False
        self._before: dict[str, list[Tensor]] | None = None
        self._norms: dict[str, Tensor] = {}

        evaluated = {n: o.eval_rows for n, o in self.objectives.items() if o.eval_rows is not None}
        super().__init__(
            model=model,
            args=args,
            data_collator=operator.itemgetter(0),
            eval_dataset=cast(Any, evaluated or None),
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _AroundOptimizer(self), *([KeysAtEnd(self)] if args.keys else [])],
            optimizers=optimizers,
        )
        shorten_console(self, company(self.bundle_config, signals, table))
        if (plugin := fsdp_plugin(args, self.accelerator)) is not None:
            shard(model, plugin, self.accelerator)
            treat_as_whole(self.accelerator)
            self.is_fsdp_enabled = False  # everything that trains is whole, so transformers need not handle FSDP
            trunk = trunk_parameters(model)  # sharding replaced the parameters
            self.trunk = TrunkProjection(trunk, {}, args.trunk_refresh)
        if self.accelerator.num_processes > 1:
            start_alike(model)
        check_topics(self.topics, list(self.objectives.values()), plugin is not None)
        self.forward = Forward(model, signals, table, self.accelerator.autocast, self.topics)
        for objective in self.objectives.values():
            if (head := objective.head()) is not None:
                head.to(args.device)
        if self.is_world_process_zero():
            for line in self.promises():
                logger.info(line)

    def promises(self) -> list[str]:
        """What the run guarantees, one sentence per objective: which others cannot change what its bundles learn.

        It follows from two tables: the bundles that a signal updates, and the bundles that are on in an objective's
        rows. It is logged at level INFO when the trainer is made.
        """
        trained = [name for name, p in self.trunk.parameters.items() if p.requires_grad]
        if all(".modules_to_save." in name for name in trained) and trained:
            return ["modules_to_save are trained: every objective moves them; the reference is the base without them."]
        if trained:
            return ["the trunk is trained: every objective moves it, and with it the reference (bundles off)."]
        return promises(self.bundle_config, self.forward.signals, self.forward.table)

    # ---- data: the rows of a step ----

    def share(self, name: str, *, held_out: bool = False) -> Share:
        """This process's rows of an objective."""
        rows = (self.args.rows or {}).get(name, self.args.per_device_train_batch_size)
        rows = self.args.per_device_eval_batch_size if held_out else rows
        accelerator = self.accelerator
        return Share(
            rows,
            self.args.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
            self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of micro-batches. The rows themselves are a function of the step (`Objective.batches`)."""
        steps = max(math.ceil(o.steps(self.share(n)) / self.plan.share(n)) for n, o in self.objectives.items())
        count = steps * self.args.gradient_accumulation_steps
        return DataLoader(cast(Any, range(count)), collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, {objective: batch}, each batch with its weight in the step.

        The weight is the micro-batch's share of the step's items (tokens, pairs) on all processes. So neither
        accumulation nor the number of processes changes the gradient.
        """
        self.run_log.start_clock()
        taken = len(list(itertools.islice(epoch_iterator, num_batches)))
        micro_batches: list[dict[str, Batch]] = [{} for _ in range(taken)]
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
            for target, batch, weight in zip(micro_batches, batches, items / total * share.world):
                target[name] = {**batch, "weight": weight}
        self.topic_rates.note(micro_batches, self.args.device, self.accelerator.num_processes)
        return micro_batches, None

    def floating_point_ops(self, inputs: dict[str, Batch]) -> float:
        """6 N per token, forward and backward. An upper bound: a frozen trunk saves a part of the backward."""
        return 6.0 * self.model.num_parameters() * sum(b["input_ids"].numel() for b in inputs.values())

    # ---- step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Batch], num_items_in_batch: Any = None) -> Tensor:
        """Forwards and backwards of one micro-batch; returns the sum of its losses."""
        model.train()
        with state_of(model).penalty.without_penalty():  # it is added once a step, with its own seed
            total = self._forwards_and_backwards(model, inputs)
        self._micro += 1
        if self.accelerator.sync_gradients:
            self._micro = 0
            self._add_quiet_gradient(model)
            finalize_grads(model)
            reduce_gradients(self._head_parameters())
            self.run_log.close_step()
        return total

    def _forwards_and_backwards(self, model: nn.Module, inputs: dict[str, Batch]) -> Tensor:
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
            if self.topics is not None:  # a loss has no graph if its rows have none of its topics
                losses = {signal: loss for signal, loss in losses.items() if loss.requires_grad}
            if self.trunk.ranks:
                self.trunk.backward(model, losses, self.state.global_step)
            else:
                routed_backward(model, losses)
        for name, values in watched.items():
            self.run_log.add(name, torch.stack([v.float() for v in values]).mean())
        self.run_log.count_tokens(inputs.values(), total.device)
        return total

    def _groups(self, inputs: Iterable[str]) -> list[list[str]]:
        """Objectives by the forward they share.

        An objective that needs several backwards runs alone: each backward would also walk the rows of the others.
        """
        configs = self.model.peft_config
        several = {n for n in inputs if len({routing_column(configs, s) for s in self.objectives[n].signals}) > 1}
        alone = several if self.args.shared_forward else set(inputs)
        shared = [n for n in inputs if n not in alone]
        return [g for g in (shared, *([n] for n in inputs if n in alone)) if g]

    # ---- losses ----

    def _losses(self, batches: dict[str, Batch]) -> dict[str, Tensor]:
        """Signal -> loss of a micro-batch, times its weight in the step. They go to the log too."""
        outputs = self.forward(batches)
        weighted: dict[str, Tensor] = {}
        for name, batch in batches.items():
            losses, metrics = self.objectives[name].losses(outputs[name], batch)
            if self.clamp is not None:
                for signal, penalty in self.clamp(self.forward, name, outputs[name], batch, metrics).items():
                    losses[signal] = losses[signal] + penalty
            for signal, loss in losses.items():
                label = f"loss/{signal}" if name == signal else f"loss/{name}/{signal}"
                self.run_log.add_share(label, loss, batch["weight"])
                weighted[signal] = weighted.get(signal, 0) + loss * batch["weight"]
            for metric, value in metrics.items():
                self.run_log.add_share(f"{name}/{metric}", value, batch["weight"])
        return weighted

    def _add_quiet_gradient(self, model: Any) -> None:
        """The backward of `BundleModel.quiet_loss`, once a step, for the bundles that the step's losses update."""
        if self.topics is not None:
            share_seen(model)
        with seeded(self.args.device, self.args.seed, "quiet", self.state.global_step):
            loss = model.quiet_loss()
        if loss.requires_grad:
            loss.backward()
            self.run_log.add_share("loss/quiet", loss, torch.ones_like(loss))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every loss on its objective's held-out rows: "eval_loss/<signal>", and their sum, "eval_loss".

        Raises:
            ValueError: a dataset is given here, and objectives hold theirs; or no objective has held-out rows.
        """
        if eval_dataset is not None or not any(o.eval_rows is not None for o in self.objectives.values()):
            what = "no objective has held-out rows" if eval_dataset is None else "evaluate() takes no dataset"
            raise ValueError(f"{what}; give held-out rows to an objective, e.g. LM(rows, eval_dataset=held_out).")
        with self.forward.eval_mode():
            shares = {name: self.share(name, held_out=True) for name in self.objectives}
            means = held_out_means(self.forward, self.objectives, shares)
        results = {f"{metric_key_prefix}_loss": 0.0}
        for of_objective in means.values():
            for name, mean in of_objective.items():
                results[f"{metric_key_prefix}_{name}"] = mean
                results[f"{metric_key_prefix}_loss"] += mean if name.startswith("loss/") else 0.0
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: what a model predicts for rows depends on the objective."""
        raise ValueError("BundleTrainer has no predict(); use model.generate(), or evaluate() for held-out losses.")

    # ---- optimizer ----

    def _head_parameters(self) -> list[nn.Parameter]:
        return [p for parameters in head_parameters(self.objectives).values() for p in parameters]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One group for each learning rate and weight decay; every parameter in one group only."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimizer_groups(
                self.model,
                self.objectives,
                set(self.get_decay_parameter_names(self.model)),
                learning_rate=kwargs["lr"],
                weight_decay=self.args.weight_decay,
                factors=self.args.lr_multipliers or {},
                apart=self.topic_rates.bundles,
            )
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every bundle, the trunk and every head separately; returns the norm of all before clipping."""
        self._norms = clip_gradients(
            model, self.objectives, self.trunk.parameters, self.args.max_grad_norm, self.args.max_grad_norms or {}
        )
        norms = [norm.float() for norm in self._norms.values()]
        return torch.stack(norms).norm() if norms else torch.zeros(())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _before_optimizer_step(self) -> None:
        self._before = monitor.snapshot(self.model) if self._is_logging_step() else None
        self.topic_rates.scale(cast(Any, self.optimizer))

    def _after_optimizer_step(self) -> None:
        self.topic_rates.restore(cast(Any, self.optimizer))
        for parameter in self._head_parameters():
            parameter.grad = None  # transformers only zeroes the gradients of its model
        if self._before is not None:
            for bundle, norm in monitor.update_norms(self.model, self._before).items():
                self.run_log.add(f"update_norm/{bundle}", norm.float())
            for part, norm in self._norms.items():
                self.run_log.add(f"grad_norm/{part}", norm.float())
            self._before = None

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Several backwards under DDP leave ranks out of step without an error (facts in docs/decisions.md).
        # `finalize_grads` reduces instead, and this mark keeps accelerate from wrapping. `Forward` does autocast.
        model._is_accelerate_prepared = True  # type: ignore[assignment]
        return model

    # ---- logs ----

    def _is_logging_step(self) -> bool:
        step, every = self.state.global_step, int(self.state.logging_steps or 0)
        return (self.args.logging_first_step and step == 0) or (every > 0 and (step + 1) % every == 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' log, with every loss by name, the numbers of each bundle, and tokens per second."""
        if "loss" in logs:
            logs = {**logs, **self.run_log.read(self.args.device, self.accelerator.num_processes)}
        super().log(logs, start_time)

    # ---- saving and resuming ----

    def _run_state(self) -> RunState:
        settings = {
            "bundle config": comparable(self.bundle_config),
            "objectives": {name: list(o.signals) for name, o in self.objectives.items()},
            "mixing": [self.args.mixing, self.args.mixing_weights],
            "forward table": self.forward.table,
            "topics": self.args.topics,
            "trunk": [self.args.trunk, self.args.trunk_ranks],
            "seed": self.args.seed,
            "per_device_train_batch_size or rows": {name: self.share(name).rows for name in self.objectives},
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "number of training rows": {name: len(o.rows) for name, o in self.objectives.items()},
        }
        trunk = self.trunk if self.args.trunk == "full" else None
        accelerator = self.accelerator
        return RunState(settings, self.objectives, trunk, accelerator.process_index, accelerator.num_processes)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' checkpoint, written to a temporary folder and renamed when complete."""
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        with staged(run, f"{PREFIX_CHECKPOINT_DIR}-{step}", self.args.should_save) as folder:
            self.accelerator.wait_for_everyone()
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            self._run_state().save_objectives(folder)
            self.accelerator.wait_for_everyone()
            best = self.state.best_global_step
            best_folder = run / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            if self.args.should_save and best and (best == step or best_folder.exists()):
                # transformers looked for the best checkpoint in the staging folder.
                self.state.best_model_checkpoint = str(best_folder)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._run_state().save_weights(Path(output_dir or cast(str, self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, run = Path(resume_from_checkpoint), self._run_state()
        run.check(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        run.load_weights(folder)
        run.load_objectives(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._run_state().load_weights(Path(cast(str, self.state.best_model_checkpoint)))


class _AroundOptimizer(TrainerCallback):
    """Calls the trainer before and after the optimizer steps."""

    def __init__(self, trainer: BundleTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._before_optimizer_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._after_optimizer_step()
