"""A call's condition: captions, guidance and any number of ControlNets, each on in some of the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.pipelines.control import ControlInput
from sana_sprint.pipelines.denoise import Conditioning, Control, denoise
from sana_sprint.pipelines.inputs import Plan
from sana_sprint.pipelines.start import from_noise
from sana_sprint.pipelines.text import Prompts
from sana_sprint.resolutions import Size
from sana_sprint.sampling import euler, heun
from tests.helpers.models import randomize
from tests.helpers.pipeline import PROMPT, tiny_pipeline

STEP = 1  # all controls are on in it, unless a test says otherwise
SIZE = Size(32, 32, 32, 32)


def sketch(where: int) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(picture).rectangle((where, 6, where + 12, 24), outline="black", width=2)
    return picture


@pytest.fixture(scope="module")
def text() -> Conditioning:
    pipe = tiny_pipeline()
    with torch.no_grad():
        prompts = Prompts(PROMPT).encode(pipe.prompt_encoder, False, 300, None)
        return Conditioning.of(pipe.transformer, prompts, 2, (4.5, 4.0))


@pytest.fixture(scope="module")
def controls(text: Conditioning) -> tuple[Control, Control]:
    """Branches of both forms and of different depth, with a picture each."""
    vae, made = tiny_pipeline().vae, []
    plan = Plan(num_prompts=1, repeats=2, size=SIZE, times=(1.5, 1.3, 1.1, 0.6, 0.0))
    for i, (topology, depth) in enumerate([("diffusers", 2), ("official", 1)]):
        branch = SanaControlNetModel.from_transformer(text.transformer, num_layers=depth, topology=topology)
        randomize(branch, seed=4 + i)
        given = ControlInput(
            controlnet=branch.eval(),
            vae=vae,
            pictures=(sketch(2 + 14 * i),),
            kind="scribble",
            thickness=None,
            scale=0.7 + i,
            start=0.0,
            end=1.0,
        )
        with torch.no_grad():
            made.append(given.prepare(plan).encode(text, 2))
    return made[0], made[1]


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def velocity(text: Conditioning, *controls: Control, step: int = STEP) -> torch.Tensor:
    return replace(text, controls=controls).velocity(noise(), torch.tensor([0.8, 0.8]), step)


def test_one_control_is_what_the_transformer_makes_of_its_residuals_bit_for_bit(
    text: Conditioning, controls: tuple[Control, Control]
) -> None:
    x, t = noise(), torch.tensor([0.8, 0.8])
    for control in controls:
        with torch.no_grad():
            steered = control.controlnet.steer(x, t, control.context, text.guidance, control.scale)
            expected = text.transformer(x, t, text.context, text.guidance, steered)
        assert torch.equal(velocity(text, control), expected)


def test_several_controls_add_the_sum_of_their_residuals(
    text: Conditioning, controls: tuple[Control, Control]
) -> None:
    x, t = noise(), torch.tensor([0.8, 0.8])
    with torch.no_grad():
        steered = [c.controlnet.steer(x, t, c.context, text.guidance, c.scale) for c in controls]

        def both(tokens: torch.Tensor, modulation: torch.Tensor) -> dict[int, torch.Tensor]:
            first, second = (each(tokens, modulation) for each in steered)
            assert set(first) == {1, 2}
            assert set(second) == {0}
            return {**first, **second}

        expected = text.transformer(x, t, text.context, text.guidance, both)
    assert torch.equal(velocity(text, *controls), expected)
    torch.testing.assert_close(velocity(text, *reversed(controls)), expected, rtol=1e-5, atol=1e-5)


def test_residuals_of_the_same_block_are_added(text: Conditioning, controls: tuple[Control, Control]) -> None:
    control = controls[0]
    twice = velocity(text, replace(control, scale=0.5), replace(control, scale=0.25))
    torch.testing.assert_close(twice, velocity(text, replace(control, scale=0.75)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(twice, velocity(text, replace(control, scale=0.5)), atol=1e-2)


def test_a_control_counts_in_its_steps_only_and_not_at_scale_zero(
    text: Conditioning, controls: tuple[Control, Control]
) -> None:
    first, second = (replace(control, steps=frozenset({i})) for i, control in enumerate(controls))
    assert torch.equal(velocity(text, first, second, step=0), velocity(text, first, step=0))
    assert torch.equal(velocity(text, first, second, step=1), velocity(text, second, step=1))
    assert torch.equal(velocity(text, first, second, step=2), velocity(text))
    off = replace(controls[0], scale=0.0)
    assert torch.equal(velocity(text, off, controls[1]), velocity(text, controls[1]))


def test_other_text_reaches_every_branch(text: Conditioning, controls: tuple[Control, Control]) -> None:
    changed = replace(text, controls=controls)
    embeds = torch.randn(text.text.embeds.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        changed.replace_text(embeds)
        for before, after in zip(controls, changed.controls, strict=True):
            captions = after.controlnet.encode_control_caption(text.transformer, embeds, text.text.mask)
            assert torch.equal(after.context.captions.keys[0], captions.keys[0])
            assert not torch.equal(after.context.captions.keys[0], before.context.captions.keys[0])
            assert torch.equal(after.context.condition, before.context.condition)


@pytest.mark.parametrize(("sampler", "evaluations"), [(euler, [0, 1, 2]), (heun, [0, 0, 1, 1, 2])])
def test_a_sampler_with_several_evaluations_in_a_step_follows_in_the_right_steps(
    text: Conditioning,
    controls: tuple[Control, Control],
    monkeypatch: pytest.MonkeyPatch,
    sampler: object,
    evaluations: list[int],
) -> None:
    followed: list[bool] = []
    forward = text.transformer.forward

    def record(x: torch.Tensor, t: torch.Tensor, *rest: object) -> torch.Tensor:
        followed.append(len(rest) > 2 and rest[2] is not None)
        return forward(x, t, *rest)

    monkeypatch.setattr(text.transformer, "forward", record)
    only_second_step = replace(text, controls=(replace(controls[0], steps=frozenset({1})),))
    with torch.no_grad():
        denoise(
            only_second_step,
            from_noise(noise(), [1.5, 1.0, 0.5, 0.0]),
            torch.Generator(),
            on_step=lambda i, t, u: None,
            sampler=sampler,
        )
    assert followed == [step == 1 for step in evaluations]
