"""What `BundleTrainer` logs and evaluates: every loss by its name, and what each bundle did."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives.forward import seeded
from . import monitor


if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as _Base
else:
    _Base = object


class LogsMixin(_Base):
    """Logs and evaluation for `BundleTrainer`."""

    _metrics: dict[str, list[Tensor]]

    def _is_logging_step(self: Any) -> bool:
        step, every = self.state.global_step, int(self.state.logging_steps or 0)
        return (self.args.logging_first_step and step == 0) or (every > 0 and (step + 1) % every == 0)

    def _before_update(self: Any) -> None:
        self._before = monitor.snapshot(self.model) if self._is_logging_step() else None

    def _after_update(self: Any) -> None:
        for parameter in self._head_parameters():
            parameter.grad = None  # the trainer zeroes those of its model only
        if self._before is None:
            return
        for bundle, norm in monitor.update_norms(self.model, self._before).items():
            self._metrics.setdefault(f"update_norm/{bundle}", []).append(norm.float())
        for bundle, norm in self._bundle_norms.items():
            self._metrics.setdefault(f"grad_norm/{bundle}", []).append(norm.float())
        self._before = None

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's own, with every loss by name, what the bundles did, and tokens/s since the last log."""
        if "loss" in logs:
            means = {name: torch.stack(values).mean() for name, values in self._metrics.items()}
            means["tokens_per_second"] = self._tokens * self.accelerator.num_processes  # a mean times their number
            now = time.perf_counter()
            logs = {**logs, **self._over_ranks(means)}
            logs["tokens_per_second"] /= max(now - self._since, 1e-9)
            self._metrics, self._tokens, self._since = {}, torch.zeros(()), now
        super().log(logs, start_time)

    def _over_ranks(self: Any, values: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes. The names are the same on all of them: they follow from the step."""
        if not values:
            return {}
        flat = torch.stack([v.float().to(self.args.device) for v in values.values()])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(flat)
            flat /= self.accelerator.num_processes
        return dict(zip(values, flat.tolist()))

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(
        self: Any, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Every loss on its objective's held-out rows: `eval_loss/<signal>`, and their sum, `eval_loss`.

        Raises:
            ValueError: a dataset is given here; objectives hold theirs.
        """
        if eval_dataset is not None:
            raise ValueError("give held-out rows to the objectives (eval_dataset=), not to evaluate().")
        results: dict[str, float] = {f"{metric_key_prefix}_loss": 0.0}
        training = self.model.training
        self.model.eval()
        for name, objective in self.objectives.items():
            if objective.eval_rows is None:
                continue
            sums: dict[str, Tensor] = {}
            count = torch.zeros((), device=self.args.device)
            with seeded(self.args.device, self.args.seed, "eval", name, self.accelerator.process_index):
                for batch in objective.eval_batches(self.forward, self.share(name)):
                    losses, metrics = objective.losses(self.forward({name: batch})[name], batch)
                    items = objective.items(batch) * batch["weight"]
                    count += items
                    named = {f"loss/{s}": v for s, v in losses.items()} | {f"{name}/{m}": v for m, v in metrics.items()}
                    for key, value in named.items():
                        sums[key] = sums.get(key, 0) + value.float() * items
            for key, mean in self._summed(sums, count).items():
                results[f"{metric_key_prefix}_{key}"] = mean
                results[f"{metric_key_prefix}_loss"] += mean if key.startswith("loss/") else 0.0
        self.model.train(training)
        self.log(results)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _summed(self: Any, sums: dict[str, Tensor], count: Tensor) -> dict[str, float]:
        """Sums over all ranks, divided by the items."""
        if self.accelerator.num_processes > 1:
            flat = torch.stack([*sums.values(), count])
            dist.all_reduce(flat)
            sums, count = dict(zip(sums, flat[:-1])), flat[-1]
        return {name: float(value / count.clamp_min(1e-12)) for name, value in sums.items()}
