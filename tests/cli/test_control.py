"""`sana-sprint control`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sana_sprint.images import read_settings
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
from tests.helpers.cli import assert_refused, call, save_tiny_model, succeed
from tests.helpers.models import randomize
from tests.helpers.pipeline import tiny_pipeline

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a controlnet, and one without."""
    text = tiny_pipeline()
    branch = SanaControlNetModel.from_transformer(text.transformer, num_layers=1)
    randomize(branch, seed=4)
    folder = tmp_path_factory.mktemp("models") / "controlled"
    SanaSprintControlNetPipeline.from_pipe(text, controlnet=branch.eval()).save_pretrained(folder)
    return {"controlled": folder, "plain": save_tiny_model(tmp_path_factory)}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_sketch(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANA_SPRINT_MODEL", str(models["controlled"]))
    for name, left in (("left", 4), ("right", 60)):
        picture = Image.new("RGB", (100, 100), "white")
        ImageDraw.Draw(picture).ellipse((left, 20, left + 36, 80), outline="black", width=5)
        picture.save(f"{name}.png")
    Image.new("RGB", (100, 100), "white").save("blank.png")
    Path("text.png").write_text("not a picture")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.int64)


def drawn(*arguments: object, **settings: Any) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(succeed("control", *arguments, "--json", **settings))
    return report


def test_pictures_follow_the_sketch_and_say_so() -> None:
    left = drawn(PROMPT, "--image", "left.png", "--seed", 7, "-n", 2, "--preview", "seen.png")
    assert left["seeds"] == [7, 8]
    assert (left["image"], left["kind"], left["controlnet_conditioning_scale"]) == (
        "left.png",
        "scribble",
        1.0,
    )
    right = drawn(PROMPT, "--image", "right.png", "--seed", 7)
    assert (
        np.abs(pixels(left["files"][0]) - pixels(right["files"][0])).mean() > 1
    )  # unrelated ones differ by about 50
    with Image.open(left["files"][1]) as picture:
        settings = read_settings(picture)
    assert settings is not None
    assert (settings["seed"], settings["image"], settings["kind"]) == (8, "left.png", "scribble")


def test_the_preview_is_what_the_model_saw() -> None:
    succeed("control", PROMPT, "--image", "left.png", "--preview", "seen.png", "-s", 1)
    seen = pixels("seen.png")
    assert seen.shape == (32, 32, 3)
    assert set(np.unique(seen)) == {0, 255}  # white lines on black
    assert seen[:, :16].any()
    assert not seen[:, 20:].any()


def test_settings_reach_the_model() -> None:
    def picture(*arguments: object) -> np.ndarray:
        return pixels(drawn(PROMPT, "-i", "left.png", "-s", 1, *arguments)["files"][0])

    free = pixels(json.loads(succeed("generate", PROMPT, "-s", 1, "--json"))["files"][0])
    assert (picture("--scale", 0) == free).all()
    followed = picture()
    for arguments in (("--end", 0.5), ("--kind", "canny"), ("--thickness", 9), ("--kind", "none")):
        assert (picture(*arguments) != followed).any(), arguments


def test_a_controlnet_from_elsewhere(models: dict[str, Path]) -> None:
    own = drawn(PROMPT, "-i", "left.png", "-s", 1)
    other = drawn(
        PROMPT, "-i", "left.png", "-s", 1, "-m", models["plain"], "--controlnet", models["controlled"]
    )
    assert (pixels(own["files"][0]) == pixels(other["files"][0])).all()
    missing = call("control", PROMPT, "-i", "left.png", "-m", models["plain"])
    assert_refused(missing, 1, "lacks controlnet", "--controlnet")


def test_a_lora_and_quantised_weights_are_used_and_noted() -> None:
    generator = torch.Generator().manual_seed(0)
    width = tiny_pipeline().transformer.config.width
    lora = {
        f"transformer.transformer_blocks.0.attn1.to_q.lora_{part}.weight": torch.randn(
            *shape, generator=generator
        )
        for part, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    save_file(lora, "style.safetensors")
    arguments = (PROMPT, "-i", "left.png", "-s", 1)
    plain = drawn(*arguments)
    styled = drawn(*arguments, "--lora", "style.safetensors:0.8")
    assert styled["loras"] == ["style.safetensors:0.8"]
    small = drawn(*arguments, "--quantize", "transformer=int8-weights")
    assert small["quantize"] == "transformer=int8-weights"
    for other in (styled, small):
        assert (pixels(other["files"][0]) != pixels(plain["files"][0])).any()
    assert_refused(call("control", *arguments, "--lora", "absent.safetensors"), 1, "absent.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "absent.png"], ["cannot read", "absent.png"]),
        (["--image", "text.png"], ["cannot read", "text.png"]),
        (["--image", "blank.png"], ["blank"]),
        (["--image", "left.png", "--kind", "scrible"], ["scrible", "scribble, canny"]),
        (["--image", "left.png", "--kind", "canny", "--thickness", 3], ["thickness"]),
        (["--image", "left.png", "--scale", -1], ["--scale"]),
        (["--image", "left.png", "--start", 0.5, "--end", 0.2], ["--start"]),
        (["--image", "left.png", "--preview", "seen.jpg"], [".png"]),
        (["--image", "left.png", "--preview", "folder"], ["--preview"]),
        ([], ["--image"]),
    ],
)
def test_wrong_calls_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], words: list[str]
) -> None:
    monkeypatch.setenv("SANA_SPRINT_MODEL", "no-such-model")
    assert_refused(call("control", PROMPT, *arguments), 2, *words)


def test_generate_follows_a_picture_in_the_same_way() -> None:
    arguments = (PROMPT, "--image", "left.png", "--kind", "canny", "--scale", 0.7, "--end", 0.5, "-s", 1)
    assert pixels(drawn(*arguments, "-o", "one")["files"][0]).tolist() == (
        pixels(json.loads(succeed("generate", *arguments, "-o", "two", "--json"))["files"][0]).tolist()
    )


@pytest.mark.parametrize(
    "option",
    [
        ("--kind", "canny"),
        ("--thickness", 3),
        ("--preview", "seen.png"),
        ("--scale", 0),
        ("--start", 0),
        ("--end", 1),
        ("--controlnet", "folder"),
    ],
)
def test_options_about_a_picture_need_one(
    monkeypatch: pytest.MonkeyPatch, option: tuple[str, object]
) -> None:
    monkeypatch.setenv("SANA_SPRINT_MODEL", "no-such-model")
    assert_refused(call("generate", PROMPT, *option), 2, option[0], "--image is missing")


def test_both_commands_have_the_same_options() -> None:
    helps = [succeed(command, "--help") for command in ("generate", "control")]
    assert len({text[text.index("Arguments:") :] for text in helps}) == 1
