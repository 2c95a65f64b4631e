"""Training the trunk (the base model's own weights), each signal in its own subspace.

With trunk="full" the trunk gets the sum of all losses' gradients. For a signal with a rank R, its gradient G of a
weight matrix becomes P P^T G (or G P P^T, on the shorter side). P holds the first R left (right) singular vectors of
the signal's own gradient in the first micro-batch, over all processes, of the step in which the subspace was last
chosen: GaLore's projector (Zhao et al. 2024, arXiv 2403.03507), one for each signal. Weights that are not matrices
(norms) get no gradient from such a signal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.walking import bundle_parameters
from ..routing.backward import routed_backward


def trunk_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The floating-point parameters that belong to no bundle, by name."""
    of_bundles = {id(p) for parameters in bundle_parameters(model).values() for p in parameters}
    return {n: p for n, p in model.named_parameters() if id(p) not in of_bundles and p.is_floating_point()}


class TrunkProjection:
    """The trunk and the subspaces that signals train it in.

    Args:
        parameters: of the trunk, by name.
        ranks: signal -> rank R of its subspace; gradients of other signals are not projected.
        refresh: number of steps after which a subspace is chosen again.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Mapping[str, int], refresh: int) -> None:
        self.parameters, self.ranks, self.refresh = dict(parameters), dict(ranks), refresh
        self.projectors: dict[tuple[str, str], Tensor] = {}  # (signal, parameter) -> (short side, R)
        self._chosen: dict[str, int] = {}

    def backward(self, model: nn.Module, losses: Mapping[str, Tensor], step: int) -> None:
        """One `routed_backward` for each signal; adds its projected gradient to the trunk's `.grad`.

        Args:
            model: with bundles.
            losses: signal -> loss of the micro-batch.
            step: number of the optimizer step.
        """
        total = {name: p.grad for name, p in self.parameters.items()}
        for number, (signal, loss) in enumerate(losses.items()):
            for parameter in self.parameters.values():
                parameter.grad = None
            routed_backward(model, {signal: loss}, retain_graph=number < len(losses) - 1)
            period = step // self.refresh
            choose = signal in self.ranks and self._chosen.get(signal) != period
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    projected = self._project(signal, name, parameter.grad, choose)
                    if projected is not None:
                        total[name] = projected if (before := total[name]) is None else before + projected
            self._chosen[signal] = period
        for name, parameter in self.parameters.items():
            parameter.grad = total[name]

    def _project(self, signal: str, name: str, gradient: Tensor, choose: bool) -> Tensor | None:
        if signal not in self.ranks:
            return gradient
        if gradient.dim() != 2:
            return None
        tall = gradient.shape[0] > gradient.shape[1]
        matrix = gradient.T if tall else gradient  # the short side first
        if choose:
            summed = matrix.float().clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(summed)  # all processes choose the same subspace
            u, _, _ = torch.linalg.svd(summed, full_matrices=False)
            self.projectors[signal, name] = u[:, : self.ranks[signal]].contiguous().to(gradient.dtype)
        p = self.projectors[signal, name]
        projected = p @ (p.T @ matrix)
        return projected.T if tall else projected

    def state_dict(self) -> dict[str, Tensor]:
        """The projectors, by "signal|parameter"."""
        return {f"{s}|{n}": p for (s, n), p in self.projectors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """Load the projectors that were saved after `step` steps."""
        self.projectors = {}
        for key, projector in state.items():
            signal, _, name = key.partition("|")
            self.projectors[signal, name] = projector.to(self.parameters[name].device)
            self._chosen[signal] = max(step - 1, 0) // self.refresh
