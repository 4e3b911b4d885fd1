"""Calls of the ControlNet pipeline: its pictures; everything else is the text pipeline's own code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from sana_sprint import SanaSprintControlNetPipeline, SanaSprintPipeline
from sana_sprint.controls import control_picture
from sana_sprint.images import to_pil
from sana_sprint.models.controlnet import ControlNetConfig, SanaControlNetModel
from sana_sprint.precision import NonFiniteError
from sana_sprint.weights import read_model_index
from tests.helpers.models import randomize
from tests.helpers.pipeline import (
    LONG,
    PROMPT,
    assert_other_pictures,
    assert_same_pictures,
    pixels,
    tiny_pipeline,
)


def sketch(where: int = 8, size: tuple[int, int] = (32, 32)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).rectangle((where, 6, where + 12, 24), outline="black", width=2)
    return picture


def controlled(topology: str = "diffusers", *, zero: bool = False) -> SanaSprintControlNetPipeline:
    text = tiny_pipeline()
    model = SanaControlNetModel.from_transformer(text.transformer, num_layers=2, topology=topology)
    if not zero:
        randomize(model, seed=4)
    return SanaSprintControlNetPipeline.from_pipe(text, controlnet=model.eval())


@pytest.fixture(scope="module")
def pipe() -> SanaSprintControlNetPipeline:
    return controlled()


@pytest.mark.parametrize("topology", ["diffusers", "official"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_pictures_follow_what_is_drawn_in_every_number_of_steps(topology: str, steps: int) -> None:
    pipe = controlled(topology)
    arguments: dict[str, Any] = {"num_inference_steps": steps, "seed": 1, "kind": "scribble"}
    left, right = (pipe(PROMPT, image=sketch(where), **arguments).images for where in (2, 16))
    assert_other_pictures(left, right)
    assert_other_pictures(
        left, SanaSprintPipeline.from_pipe(pipe)(PROMPT, num_inference_steps=steps, seed=1).images
    )


@pytest.mark.parametrize("topology", ["diffusers", "official"])
def test_a_new_branch_or_no_scale_gives_the_base_models_pictures_bit_for_bit(topology: str) -> None:
    base = tiny_pipeline()(PROMPT, seed=3, output_type="pt").images
    new, trained = controlled(topology, zero=True), controlled(topology)
    assert torch.equal(new(PROMPT, image=sketch(), seed=3, output_type="pt").images, base)
    off = trained(PROMPT, image=sketch(), seed=3, output_type="pt", controlnet_conditioning_scale=0.0).images
    assert torch.equal(off, base)


def test_one_picture_for_all_one_per_prompt_or_one_per_image(pipe: SanaSprintControlNetPipeline) -> None:
    prompts, pictures = [PROMPT, LONG], [sketch(2), sketch(16)]
    singles = [
        pipe(prompt, image=picture, seed=seed).images[0]
        for prompt, picture, seed in zip(
            [PROMPT, PROMPT, LONG, LONG], [*pictures, *reversed(pictures)], range(4), strict=True
        )
    ]
    each = pipe(prompts, image=[*pictures, *reversed(pictures)], num_images_per_prompt=2, seed=0)
    assert_same_pictures(each.images, singles)
    assert len(each.conditions) == 4

    per_prompt = pipe(prompts, image=pictures, num_images_per_prompt=2, seed=0)
    assert_same_pictures(per_prompt.images[0], singles[0])
    assert_same_pictures(per_prompt.images[3], pipe(LONG, image=pictures[1], seed=3).images)
    shared = pipe(prompts, image=pictures[0], seed=[0, 3]).images
    assert_same_pictures(shared, [singles[0], pipe(LONG, image=pictures[0], seed=3).images[0]])


def test_captions_and_condition_are_embedded_once_per_call(
    pipe: SanaSprintControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("encode_control_caption", "encode_condition"):
        original = getattr(pipe.controlnet, name)
        monkeypatch.setattr(
            pipe.controlnet, name, lambda *a, name=name, original=original: calls.append(name) or original(*a)
        )
    pipe(PROMPT, image=sketch(), num_inference_steps=4, seed=0)
    assert sorted(calls) == ["encode_condition", "encode_control_caption"]


@pytest.mark.parametrize(
    ("start", "end", "followed"),
    [(0.0, 1.0, [0, 1, 2, 3]), (0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.2, 0.3, [1]), (0.0, 0.01, [0])],
)
def test_following_begins_and_ends_where_asked(
    pipe: SanaSprintControlNetPipeline,
    monkeypatch: pytest.MonkeyPatch,
    start: float,
    end: float,
    followed: list[int],
) -> None:
    seen = []
    original = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a: seen.append(len(a) > 4) or original(*a))
    pipe(
        PROMPT,
        image=sketch(),
        num_inference_steps=4,
        seed=0,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    assert [i for i, on in enumerate(seen) if on] == followed


def test_the_output_shows_what_the_model_saw(pipe: SanaSprintControlNetPipeline, tmp_path: Path) -> None:
    sketch().save(tmp_path / "sketch.png")
    output = pipe(PROMPT, image=tmp_path / "sketch.png", kind="scribble", seed=0)
    expected = to_pil(control_picture(sketch(), "scribble", 32, 32))
    assert (pixels(output.conditions[0]) == pixels(expected)).all()
    assert tiny_pipeline()(PROMPT, seed=0).conditions == ()


def test_a_wide_picture_stays_in_place_in_the_models_frame(pipe: SanaSprintControlNetPipeline) -> None:
    wide = Image.new("RGB", (60, 20), "white")
    ImageDraw.Draw(wide).line((30, 0, 30, 20), fill="black", width=4)
    output = pipe(PROMPT, image=wide, kind="scribble", height=20, width=60, seed=0)
    seen = output.conditions[0]
    assert seen.size == (output.model_width, output.model_height)
    columns = pixels(seen)[0, :, :, 0].mean(axis=0)
    assert abs(int(columns.argmax()) - output.model_width / 2) <= 2
    assert pixels(output.images).shape[1:3] == (20, 60)


def test_changed_embeddings_reach_the_branch(
    pipe: SanaSprintControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, seen = pipe.encode_prompt("a photo")[0], []
    encode = SanaControlNetModel.encode_control_caption

    def swap(_: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embeds = tensors["prompt_embeds"].clone()
        embeds[:, : other.shape[1]] = other[:, : embeds.shape[1]]
        return {"prompt_embeds": embeds}

    def record(self: Any, transformer: Any, text: torch.Tensor, mask: torch.Tensor) -> Any:
        seen.append(text)
        return encode(self, transformer, text, mask)

    monkeypatch.setattr(SanaControlNetModel, "encode_control_caption", record)
    pipe(
        PROMPT,
        seed=0,
        num_inference_steps=2,
        image=sketch(),
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    shared = min(other.shape[1], seen[0].shape[1])
    assert not torch.equal(seen[0][:, :shared], other[:, :shared])
    assert torch.equal(seen[1][:, :shared], other[:, :shared])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "image is missing"),
        ({"image": "absent.png"}, "cannot read the picture absent.png"),
        ({"image": Image.new("RGB", (32, 32))}, "blank"),
        ({"image": [sketch()] * 3}, r"one per prompt \(1\) or one per image \(2\); got: 3"),
        ({"image": []}, "got: 0"),
        ({"kind": "scrible"}, "kind must be one of scribble, canny, .*; got: 'scrible'"),
        ({"controlnet_conditioning_scale": -1}, "at least 0, got: -1"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "got: 0.5 and 0.5"),
        ({"control_guidance_start": 0.6}, "none of the 2 steps"),
        ({"guidance_scale": "much"}, "guidance_scale"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_any_work(
    pipe: SanaSprintControlNetPipeline,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    for module in (pipe.transformer, pipe.controlnet, pipe.vae.encoder, pipe.text_encoder):
        monkeypatch.setattr(module, "forward", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, num_images_per_prompt=2, **{"image": sketch(), **arguments})


def test_nan_of_the_encoder_is_named() -> None:
    pipe = controlled()
    with torch.no_grad():
        pipe.vae.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the autoencoder's encoder gave"):
        pipe(PROMPT, image=sketch(), seed=0)


# --- Folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(pipe: SanaSprintControlNetPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "controlled"
    pipe.save_pretrained(folder)
    return folder


def test_a_folder_brings_the_pipeline_back_and_the_text_pipeline_ignores_the_branch(
    pipe: SanaSprintControlNetPipeline, folder: Path
) -> None:
    index = read_model_index(folder)
    assert index.class_name == "SanaSprintControlNetPipeline"
    assert index.components["controlnet"] == ("diffusers", "SanaControlNetModel")
    expected = pipe(PROMPT, image=sketch(), seed=5).images
    loaded = SanaSprintControlNetPipeline.from_pretrained(folder)
    assert_same_pictures(loaded(PROMPT, image=sketch(), seed=5).images, expected)
    text = SanaSprintPipeline.from_pretrained(folder)
    assert_same_pictures(text(PROMPT, seed=5).images, tiny_pipeline()(PROMPT, seed=5).images)


def test_a_subfolder_beside_a_text_model_is_enough_and_another_can_be_given(
    pipe: SanaSprintControlNetPipeline, folder: Path, tmp_path: Path
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="lacks controlnet"):
        SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model")
    expected = pipe(PROMPT, image=sketch(), seed=5).images
    for given in (folder, str(folder / "controlnet")):  # a pipeline's folder and the branch's own
        loaded = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model", controlnet=given)
        assert_same_pictures(loaded(PROMPT, image=sketch(), seed=5).images, expected)
    shutil.copytree(folder / "controlnet", tmp_path / "model" / "controlnet")
    found = SanaSprintControlNetPipeline.from_pretrained(tmp_path / "model", torch_dtype="bfloat16")
    assert found.controlnet.dtype == torch.bfloat16
    assert_other_pictures(
        found(PROMPT, image=sketch(2), seed=5).images, found(PROMPT, image=sketch(16), seed=5).images
    )


def test_a_branch_of_another_model_is_refused(pipe: SanaSprintControlNetPipeline) -> None:
    fields = {**pipe.controlnet.config.to_dict(), "num_layers": 5}
    other = SanaSprintControlNetPipeline.from_pipe(
        pipe, controlnet=SanaControlNetModel(ControlNetConfig(**fields))
    )
    with pytest.raises(ValueError, match="a controlnet of 5 blocks does not fit a transformer of 3"):
        other(PROMPT, image=sketch(), seed=0)
