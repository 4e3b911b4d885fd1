"""The losses against the paper's equations, written out sample by sample in data space and fp64.

Nothing here uses the library's formulas: x_t and sigma_d appear as printed (Algorithm 2 and section 3 of arXiv
2503.09641), and the derivative along the teacher's path is a central difference.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from sana_sprint.train.losses import adversarial
from sana_sprint.train.losses import scm as losses
from sana_sprint.trigflow import add_noise

SIGMA_D, C = 0.5, 0.1
ANGLES = (0.1, 0.7, 1.2, 1.55)
SHAPE = (2, 3, 4)


class Network(nn.Module):
    """A smooth F(u,t) whose parameters all matter, and its log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(SHAPE[0], 5, 3, padding=1)
        self.angle = nn.Linear(2, 5)
        self.last = nn.Conv2d(5, SHAPE[0], 3, padding=1)
        self.log_variance = nn.Linear(2, 1)

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(u) + self.angle(waves(t))[:, :, None, None]))

    def logvar(self, t: Tensor) -> Tensor:
        return self.log_variance(waves(t)).squeeze(1)


def waves(t: Tensor) -> Tensor:
    return torch.stack([t.sin(), (3 * t).cos()], dim=1)


def algorithm_2(
    student: Network, x0: Tensor, z: Tensor, t: float, F_cond: Tensor, F_uncond: Tensor, w: float, r: float
) -> tuple[Tensor, Tensor]:
    """(loss, normalised g) of one sample: x0, z and the teacher's two outputs are (C,H,W), z has deviation sigma_d."""
    angle = torch.tensor([t], dtype=torch.float64)
    x_t = math.cos(t) * x0 + math.sin(t) * z
    dx_dt = SIGMA_D * (F_uncond + w * (F_cond - F_uncond))

    def output(h: float) -> Tensor:
        """The student's F where the teacher's path is after time h."""
        return student((x_t + h * dx_dt)[None] / SIGMA_D, angle + h)[0]

    h = 1e-5
    dF_dt = ((output(h) - output(-h)) / (2 * h)).detach()
    F, F_minus = output(0), output(0).detach()
    g = -(math.cos(t) ** 2) * (SIGMA_D * F_minus - dx_dt)
    g = g - r * math.cos(t) * math.sin(t) * (x_t + SIGMA_D * dF_dt)
    g = g / (g.square().sum().sqrt() + C)
    logvar = student.logvar(angle)[0]
    prior = 1 / (SIGMA_D * math.tan(t))
    return prior * torch.exp(-logvar) * (F - F_minus - g).square().mean() + logvar, g


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_consistency_loss_target_and_every_gradient(r: float) -> None:
    student = Network().double()
    x0, z = SIGMA_D * torch.randn(2, len(ANGLES), *SHAPE, dtype=torch.float64)
    F_cond, F_uncond = torch.randn(2, len(ANGLES), *SHAPE, dtype=torch.float64)
    w = [4.0, 4.5, 5.0, 4.5]

    results = [
        algorithm_2(student, x0[i], z[i], ANGLES[i], F_cond[i], F_uncond[i], w[i], r)
        for i in range(len(ANGLES))
    ]
    reference = torch.stack([loss for loss, _ in results]).mean()
    reference_gradients = torch.autograd.grad(reference, list(student.parameters()))

    t = torch.tensor(ANGLES, dtype=torch.float64)
    u = add_noise(x0 / SIGMA_D, z / SIGMA_D, t)
    teacher_F = torch.stack([F_uncond[i] + w[i] * (F_cond[i] - F_uncond[i]) for i in range(len(ANGLES))])
    F = student(u, t)
    tangent = losses.scaled_tangent(student, u, t, teacher_F)
    g = losses.consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=r)
    ours, _ = losses.scm_loss(F, g, t, student.logvar(t))
    gradients = torch.autograd.grad(ours, list(student.parameters()))

    # The library rounds the tangent to fp32, 6e-8 of it, and h = 1e-5 truncates 1e-10; g has norm 1 at most.
    torch.testing.assert_close(g, torch.stack([g for _, g in results]), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)
    for gradient, expected in zip(gradients, reference_gradients, strict=True):
        assert expected.abs().max() > 1e-3  # each parameter takes part
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    # What normalising took away can be had back: paper-space norms divided by sigma_d. 1/(1 - norm) grows the rounding.
    raw = -(torch.cos(t)[:, None, None, None] ** 2) * (F.detach() - teacher_F) - r * (
        (torch.cos(t) * torch.sin(t))[:, None, None, None] * u + tangent
    )
    torch.testing.assert_close(
        losses.direction_norm(g).double(), raw.flatten(1).norm(dim=1), rtol=1e-5, atol=0
    )


def test_the_teachers_guidance_may_be_applied_on_either_side_of_the_wrapper() -> None:
    """The paper guides in TrigFlow outputs; the wrapper is affine in v, so guided velocities give the same."""
    from sana_sprint.train.losses.flow import guided
    from sana_sprint.trigflow import flow_denoiser

    network = Network().double()
    u = torch.randn(4, *SHAPE, dtype=torch.float64)
    t, scale = torch.tensor(ANGLES, dtype=torch.float64), torch.tensor([4.0, 4.5, 5.0, 1.0])

    def unconditional(x: Tensor, s: Tensor) -> Tensor:
        return network(-x, s)

    inside = flow_denoiser(guided(network, unconditional, scale))(u, t)
    with_caption, without = flow_denoiser(network)(u, t), flow_denoiser(unconditional)(u, t)
    outside = without + scale[:, None, None, None] * (with_caption - without)
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-12)  # fp64 rounding of numbers below 10


# ----- the adversarial losses (section 3.3) ---------------------------------------------------------------------------


def test_hinge_losses_and_their_gradients() -> None:
    # All four kinds of logit: inside the margin, outside, and on either side of zero; more fakes than reals.
    real = torch.tensor([[-2.0, 0.3], [0.9, 1.7]], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([[-1.6, -0.2], [0.4, 2.5], [-3.0, -0.9]], dtype=torch.float64, requires_grad=True)
    loss, metrics = adversarial.hinge_discriminator(real, fake)
    by_hand = (3.0 + 0.7 + 0.1 + 0.0) / 4 + (0.0 + 0.8 + 1.4 + 3.5 + 0.0 + 0.1) / 6
    assert loss.item() == pytest.approx(by_hand / 2, rel=1e-12)
    for_real, for_fake = torch.autograd.grad(loss, [real, fake])
    # Inside the margin each logit pulls with half its share of the mean; outside it, not at all.
    assert for_real.tolist() == [[-1 / 8, -1 / 8], [-1 / 8, 0.0]]
    assert for_fake.tolist() == [
        [0.0, pytest.approx(1 / 12)],
        [pytest.approx(1 / 12)] * 2,
        [0.0, pytest.approx(1 / 12)],
    ]
    assert metrics["real_saturated"] == 1 / 4
    assert metrics["fake_saturated"] == pytest.approx(2 / 6)
    assert metrics["real_logit"] == pytest.approx(0.225)
    assert metrics["fake_logit"] == pytest.approx(-2.8 / 6)

    generator = adversarial.hinge_generator(fake)
    assert generator.item() == pytest.approx(2.8 / 6, rel=1e-12)
    (pull,) = torch.autograd.grad(generator, fake)
    # The same pull on every logit, also where the discriminator is sure: there it is needed most.
    torch.testing.assert_close(pull, torch.full_like(pull, -1 / 6))


def test_r1_penalty_of_heads_whose_gradient_is_known() -> None:
    """Logits a.x + y^2/2 per token have the gradients a and y, so the penalty and its own gradient are closed form."""
    B, N, D = 3, 4, 5
    x, y = torch.randn(2, B, N, D, dtype=torch.float64).unbind()
    x.requires_grad_()
    y.requires_grad_()
    a = torch.randn(D, dtype=torch.float64, requires_grad=True)
    logits = torch.cat([x @ a, y.square().sum(2) / 2], dim=1)
    penalty = adversarial.r1_penalty(logits, [x, y])
    expected = (B * N * a.square().sum() + y.square().sum()) / B
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)  # squares are summed in fp32
    (gradient,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 2 * N * a.detach(), rtol=1e-6, atol=0)
