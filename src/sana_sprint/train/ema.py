"""The moving average of weights, and optimiser states by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sana_sprint.torch_private import lerp_all


def averaging_weight(decay: float, step: int) -> float:
    """The weight of the newest parameters in an average at step `step` (from 0).

    The decay warms up as (1 + step) / (10 + step), so that early averages forget the initial weights.
    """
    return 1 - min(decay, (1 + step) / (10 + step))


class EMA:
    """Exponential moving average of named parameters, in fp32, with the weights of `averaging_weight`."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.weights = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the parameters after optimiser step `step` (from 0)."""
        weight = averaging_weight(self.decay, step)
        if self.weights:
            live = [p.detach().float() for p in self.parameters.values()]
            lerp_all(list(self.weights.values()), live, weight)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Restores a saved average."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameters and the average; twice is the identity."""
        for name, parameter in self.parameters.items():
            live = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(live)


def optimizer_states(optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every parameter's optimiser state by the parameter's name, whichever of the optimisers has it."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names[id(parameter)]: state
        for optimizer in optimizers
        for parameter, state in _states(optimizer)
        if state
    }


def load_optimizer_states(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor], states: Mapping[str, Any]
) -> None:
    """Restores `optimizer_states()`, as far as it concerns these parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        found = [states.get(names[id(parameter)], {}) for parameter, _ in _states(optimizer)]
        saved = {number: state for number, state in enumerate(found) if state}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})


def _states(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """An optimiser's parameters, in the order of their numbers in its state dict, with their states."""
    states = optimizer.state_dict()["state"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return ((parameter, states.get(number, {})) for number, parameter in enumerate(parameters))
