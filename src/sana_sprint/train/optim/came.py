"""CAME (arXiv 2307.02047): Adam's quality with memory for one average per parameter, SANA-Sprint's optimiser.

Both second moments of a matrix are kept as one number for each row and one for each column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_EPS_SQUARE = 1e-30  # epsilon_1, the paper's
_EPS_RESIDUAL = 1e-16  # epsilon_2, the paper's
_MAX_RMS = 1.0  # d: an update's root mean square before averaging is at most this


class CAME(Optimizer):
    """Algorithm 2 of the paper, without bias correction, as published.

    Tensors of three and more dimensions are factored along their last two; vectors keep their second moment whole and
    need no confidence. Weight decay is decoupled, as AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Moves every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    beta1, beta2, beta3 = group["betas"]
    scale = _inverse_root(gradient.square() + _EPS_SQUARE, "square", state, beta2)
    update = gradient * scale
    update /= (update.square().mean().sqrt() / _MAX_RMS).clamp(min=1.0)
    average = _running(state, "average", update, beta1)
    if update.ndim > 1:
        # Where updates keep away from their average, there is little confidence in it, and the step is smaller.
        residual = (update - average).square() + _EPS_RESIDUAL
        average = average * _inverse_root(residual, "residual", state, beta3)
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average, alpha=group["lr"])


def _inverse_root(values: Tensor, name: str, state: dict[str, Tensor], beta: float) -> Tensor:
    """1/sqrt of the running mean of `values`, which for a matrix is the outer product of its rows' and columns' means."""
    if values.ndim < 2:
        return _running(state, f"{name}_mean", values, beta).rsqrt()
    rows = _running(state, f"{name}_rows", values.mean(-1), beta)
    columns = _running(state, f"{name}_columns", values.mean(-2), beta)
    # Two roots rather than one of the product, which could underflow.
    row_factor = (rows / rows.mean(-1, keepdim=True)).rsqrt()
    return row_factor[..., :, None] * columns.rsqrt()[..., None, :]


def _running(state: dict[str, Tensor], name: str, new: Tensor, beta: float) -> Tensor:
    """beta times the average of that name, zero at first, plus (1 - beta) times `new`."""
    if name not in state:
        state[name] = torch.zeros_like(new)
    return state[name].lerp_(new, 1 - beta)
