"""The training loop of all studies: AdamW on the parts of a frozen model, one CUDA graph a step where possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.rows import Rows


logger = logging.getLogger(__name__)


class Training:
    """Trains groups of parameters step by step, each at a rate of its own.

    With `fixed` batches every step reads the same tensors, into which a batch is copied. On a GPU the step is then
    captured as a CUDA graph: a step of a small model is bound by kernel launches.

    Args:
        groups: parameters that share a learning rate.
        gradients: one step's forward and backward; gets a batch (several `Rows`, or whatever the batches hold) and
            returns the losses to report, detached.
        fixed: a first batch of `Rows`, whose shapes all batches have; none: the batches are read as they are.
        decay: weight decay.
        clip: the largest norm of each group's gradient, or a function that clips, or None.
        update: replaces the optimizer's step; a function of the optimizer.
        around: makes the context of every step.
        graph: capture the step where `fixed` and a GPU allow it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> def gradients(target):
        ...     loss = (weight - target).square().sum()
        ...     loss.backward()
        ...     return loss.detach()
        >>> training = Training([[weight]], gradients)
        >>> training.run([(torch.zeros(2),)] * 3, lambda n: [0.1])
        3
        >>> bool((weight < 1).all())
        True
    """

    def __init__(
        self,
        groups: Sequence[Iterable[nn.Parameter]],
        gradients: Callable[..., Tensor],
        *,
        fixed: Sequence[Rows] = (),
        decay: float = 0.0,
        clip: float | Callable[[], Any] | None = None,
        update: Callable[[torch.optim.Optimizer], Any] | None = None,
        around: Callable[[], Any] = nullcontext,
        graph: bool = True,
    ) -> None:
        self.groups = [list(group) for group in groups]
        self.parameters = [p for group in self.groups for p in group]
        self.gradients, self.clip, self.update, self.around = gradients, clip, update, around
        device = self.parameters[0].device
        cuda = device.type == "cuda"
        self.fixed = tuple(Rows(*(t.clone() for t in rows.tensors())) for rows in fixed)
        # A captured step reads its rates from tensors; a Python float has the precision of a double.
        rates: list[Any] = [torch.zeros((), device=device) if fixed else 0.0 for _ in self.groups]
        flags: dict[str, Any] = {"capturable": cuda, "foreach": cuda} if fixed else {}
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in zip(self.groups, rates)],
            lr=rates[0],
            weight_decay=decay,
            **flags,
        )
        self.losses: Tensor | None = None
        self.wanted = bool(fixed) and cuda and graph
        self.replay: Callable[[], Any] | None = None

    @property
    def captured(self) -> bool:
        """Whether the step is a CUDA graph."""
        return self.replay is not None

    def run(
        self,
        batches: Iterable[tuple[Any, ...]],
        rates: Callable[[int], Sequence[float]],
        after: Callable[[int, Tensor], Any] | None = None,
    ) -> int:
        """Train on the batches, with a fresh state of AdamW; resetting the parameters is the caller's.

        Args:
            rates: number of the step, from 0 -> the learning rate of every group.
            after: called with the number of steps done and the step's losses; True ends the run.

        Returns:
            The number of steps done.
        """
        for state in self.optimizer.state.values():
            for entry in state.values():
                entry.zero_()
        if self.wanted and self.replay is None:
            with self.around():
                self._capture()
        done = 0
        for batch in batches:
            for group, rate in zip(self.optimizer.param_groups, rates(done)):
                if self.fixed:
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            for into, source in zip(self.fixed, batch):
                for a, b in zip(into.tensors(), source.tensors()):
                    a.copy_(b)
            with self.around():
                if self.replay is not None:
                    self.replay()
                else:
                    self._step(*(self.fixed or batch))
            done += 1
            if after is not None and after(done, self.losses):  # type: ignore[arg-type]
                break
        return done

    def _step(self, *batch: Any) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.losses = self.gradients(*batch)
        if callable(self.clip):
            self.clip()
        elif self.clip is not None:
            for group in self.groups:
                nn.utils.clip_grad_norm_(group, self.clip)
        if self.update is None:
            self.optimizer.step()
        else:
            self.update(self.optimizer)

    def _capture(self) -> None:
        """Record a step; the parameters and AdamW's state are then as they were before the warm-up that it needs."""
        before = [p.detach().clone() for p in self.parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(*self.fixed)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step(*self.fixed)
            self.replay = graph.replay
        except Exception as error:  # some method waits for the device somewhere
            logger.warning("the step cannot be captured and runs eagerly: %.300s", error)
            torch.cuda.synchronize()
            self.wanted = False
        with torch.no_grad():
            for parameter, value in zip(self.parameters, before):
                parameter.copy_(value)
                for entry in self.optimizer.state[parameter].values():
                    entry.zero_()


def warmup_decay(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate at a step: a linear warm-up, then a linear decay towards 0.

    Example:
        >>> [warmup_decay(n, steps=6, warmup=2) for n in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, (steps - step) / max(1, steps - warmup))


def final_states(model: Any, ids: Tensor) -> Tensor:
    """Final hidden states (N, T, d) of a causal LM without its head."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def row_loss(logits: Tensor, rows: Rows) -> Tensor:
    """Cross-entropy of the counted tokens, weighed within a row, mean over rows; logits (P, V)."""
    losses = F.cross_entropy(logits.float(), rows.target, reduction="none")
    return (losses * rows.weight).sum() / len(rows.ids)


def autocast(device: torch.device) -> Any:
    """bfloat16 on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
