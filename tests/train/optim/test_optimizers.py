"""The optimisers against their papers, which of them gets which parameter, and the rate over time."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from sana_sprint.train.ema import load_optimizer_states, optimizer_states
from sana_sprint.train.optim.came import CAME
from sana_sprint.train.optim.optimizers import clip, make_optimizers, rate, set_rate
from sana_sprint.train.sections import OptimizerConfig

Array = np.ndarray[Any, np.dtype[np.float64]]


class PaperCAME:
    """Algorithm 2 of arXiv 2307.02047 line by line for one (n,m) matrix, with the paper's sums over rows and columns."""

    def __init__(self, n: int, m: int) -> None:
        self.R, self.C = np.zeros((n, 1)), np.zeros((1, m))
        self.S_rows, self.S_columns = np.zeros((n, 1)), np.zeros((1, m))
        self.M = np.zeros((n, m))

    def step(
        self, theta: Array, G: Array, *, lr: float, betas: tuple[float, float, float], decay: float
    ) -> Array:
        b1, b2, b3 = betas
        n, m = G.shape
        one_n, one_m = np.ones((n, 1)), np.ones((m, 1))
        square = G**2 + 1e-30 * one_n @ one_m.T
        self.R = b2 * self.R + (1 - b2) * square @ one_m
        self.C = b2 * self.C + (1 - b2) * one_n.T @ square
        V = self.R @ self.C / (one_n.T @ self.R)
        u = G / np.sqrt(V)
        u_hat = u / max(1.0, math.sqrt((u**2).mean()) / 1.0)
        self.M = b1 * self.M + (1 - b1) * u_hat
        U = (u_hat - self.M) ** 2 + 1e-16
        self.S_rows = b3 * self.S_rows + (1 - b3) * U @ one_m
        self.S_columns = b3 * self.S_columns + (1 - b3) * one_n.T @ U
        S = self.S_rows @ self.S_columns / (one_n.T @ self.S_rows)
        return theta * (1 - lr * decay) - lr / np.sqrt(S) * self.M


def test_came_follows_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    betas = (0.9, 0.99, 0.999)
    weight = nn.Parameter(torch.randn(5, 7, generator=generator, dtype=torch.float64))
    expected, paper = weight.detach().numpy().copy(), PaperCAME(5, 7)
    optimizer = CAME([weight], lr=0.01, betas=betas, weight_decay=0.1)
    for step in range(6):
        # Gradients of very different sizes, so that clipping is at work in some steps and not in others.
        gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 1)
        weight.grad = gradient
        optimizer.step()
        expected = paper.step(expected, gradient.numpy(), lr=0.01, betas=betas, decay=0.1)
        # fp64 both; a hundred operations deep, each of relative error 1e-16.
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_came_treats_kernels_as_stacks_of_matrices_and_keeps_vectors_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.zeros(2, 3, 4, 5))
    matrices = [nn.Parameter(torch.zeros(4, 5)) for _ in range(6)]
    vector = nn.Parameter(torch.zeros(3))
    together, apart = CAME([stack, vector], lr=1.0), [CAME([matrix], lr=1.0) for matrix in matrices]
    for _ in range(3):
        # Equal norms: an update is clipped by the root mean square of the whole tensor.
        gradient = torch.randn(2, 3, 4, 5, generator=generator)
        stack.grad = gradient / gradient.square().mean((2, 3), keepdim=True).sqrt()
        vector.grad = torch.tensor([1.0, -2.0, 0.0])
        together.step()
        for matrix, part in zip(matrices, stack.grad.flatten(0, 1), strict=True):
            matrix.grad = part.clone()
        for optimizer in apart:
            optimizer.step()
    rows = together.state[stack]["square_rows"].flatten(0, 1)
    expected = torch.stack([o.state[m]["square_rows"] for o, m in zip(apart, matrices, strict=True)])
    torch.testing.assert_close(rows, expected)  # fp32 means in another order
    assert together.state[vector]["square_mean"].shape == (3,)
    assert vector[0] < 0 < vector[1]
    assert vector[2] == 0


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "came", "muon"])
def test_every_optimizer_finds_a_minimum_and_continues_from_its_state(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    # A layer of 64 x 64 has as many weights as 8-bit states begin at, and is wide enough for Muon.
    config = OptimizerConfig.model_validate(
        {"name": name, "learning_rate": 0.01, "matrix_learning_rate": 0.01}
    )
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))

    def trained(stops: bool) -> tuple[list[float], nn.Linear]:
        torch.manual_seed(0)
        layer = nn.Linear(64, 64)
        parameters = dict(layer.named_parameters())
        optimizers, losses = make_optimizers(list(parameters.items()), config), []
        for step in range(40):
            if stops and step == 20:
                states = optimizer_states(optimizers, parameters)
                optimizers = make_optimizers(list(parameters.items()), config)
                load_optimizer_states(optimizers, parameters, states)
            layer.zero_grad()
            loss = (layer(x) - x.flip(1)).square().mean()
            loss.backward()
            losses.append(loss.item())
            for optimizer in optimizers:
                optimizer.step()
        return losses, layer

    losses, layer = trained(stops=False)
    assert losses[-1] < 0.5 * losses[0]
    again, other = trained(stops=True)
    assert again == losses
    assert torch.equal(layer.weight, other.weight)
    if name == "adamw8bit":
        (optimizer,) = make_optimizers([("weight", layer.weight)], config)
        optimizer.step()
        assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8


class Net(nn.Module):
    """A parameter of every kind that matters to the choice of optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(64, 64)
        self.hidden = nn.Linear(64, 64)
        self.narrow = nn.Linear(64, 8)
        self.conv = nn.Conv2d(64, 64, 3)


def test_muon_takes_hidden_matrices_and_vectors_do_not_decay() -> None:
    net = Net()
    config = OptimizerConfig(name="muon", learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1)
    muon, adam = make_optimizers(list(net.named_parameters()), config)
    assert isinstance(muon, Muon)
    assert [p is net.hidden.weight for p in muon.param_groups[0]["params"]] == [True]
    assert isinstance(adam, AdamW)
    decaying, constant = adam.param_groups
    assert (decaying["weight_decay"], constant["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decaying["params"])
    assert all(p.ndim == 1 for p in constant["params"])
    chosen = {id(p) for o in (muon, adam) for group in o.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in net.parameters()}
    set_rate([muon, adam], [0.02, 1e-3], 0.5)
    assert [g["lr"] for o in (muon, adam) for g in o.param_groups] == [0.01, 5e-4, 5e-4]


def test_no_parameters_no_optimizers() -> None:
    for name in ("adamw", "came", "muon"):
        assert make_optimizers([], OptimizerConfig.model_validate({"name": name})) == []


def test_eight_bit_adam_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"pip install \"sana-sprint\[train\]\""):
        make_optimizers(list(nn.Linear(2, 2).named_parameters()), OptimizerConfig(name="adamw8bit"))


@pytest.mark.parametrize(
    ("decay", "fraction", "expected"),
    [
        ("linear", 0.0, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.5, [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (
            "cosine",
            0.5,
            [0.25, 0.5, 0.75, 1.0, 1.0, *(0.5 - 0.5 * math.cos(math.pi * x) for x in (0.75, 0.5, 0.25))],
        ),
    ],
)
def test_the_rate_warms_up_stays_and_decays(decay: str, fraction: float, expected: list[float]) -> None:
    config = OptimizerConfig.model_validate({"warmup_steps": 4, "decay": decay, "decay_fraction": fraction})
    assert [rate(step, 8, config) for step in range(8)] == pytest.approx(expected)


def test_clipping_returns_the_norm_before() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip([weight], 1.0) == pytest.approx(5)
    assert weight.grad.norm().item() == pytest.approx(
        1, abs=1e-5
    )  # torch adds 1e-6 to the norm it divides by
