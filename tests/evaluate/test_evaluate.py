"""The scores against answers known in closed form."""

import json
import math
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.evaluate import captions, compositional, features, frechet
from sana_sprint.images import save_png
from sana_sprint.weights import load_model
from tests.helpers.cli import assert_refused, call, save_tiny_model, succeed

TINY_SIZE = 32


def noise_picture(seed: int, size: tuple[int, int] = (TINY_SIZE, TINY_SIZE)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


# ----- the Frechet distance -------------------------------------------------------------------------------------------


def test_distance_of_gaussians_with_commuting_covariances_is_closed_form() -> None:
    """With common axes the distance is |m|^2 + sum over axes of (std_a - std_b)^2."""
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    std_a, std_b = torch.tensor([[2.0, 1.0, 0.5, 3.0, 0.0, 1.0], [1.0, 1.0, 2.0, 0.1, 0.7, 0.0]]).double()
    shift = torch.tensor([0.3, -1.0, 0.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    a = frechet.Gaussian(torch.zeros(6, dtype=torch.float64), axes * std_a**2 @ axes.T)
    b = frechet.Gaussian(shift, axes * std_b**2 @ axes.T)
    expected = shift.square().sum() + (std_a - std_b).square().sum()
    # Eigenvalues of 0 come out as 1e-16 with roots of 1e-8.
    assert frechet.distance(a, b) == pytest.approx(expected.item(), abs=1e-6)
    assert frechet.distance(b, a) == pytest.approx(expected.item(), abs=1e-6)
    assert frechet.distance(b, b) == pytest.approx(0, abs=1e-6)


def test_distance_of_covariances_that_do_not_commute() -> None:
    """In two dimensions the trace of (A B)^(1/2) is sqrt(trace(A B) + 2 sqrt(det A det B))."""
    A, B = torch.tensor([[[2.0, 0.7], [0.7, 1.0]], [[0.5, -0.4], [-0.4, 3.0]]], dtype=torch.float64)
    cross = math.sqrt((A @ B).trace() + 2 * math.sqrt(torch.linalg.det(A) * torch.linalg.det(B)))
    zero = torch.zeros(2, dtype=torch.float64)
    measured = frechet.distance(frechet.Gaussian(zero, A), frechet.Gaussian(zero, B))
    assert measured == pytest.approx((A.trace() + B.trace() - 2 * cross).item(), rel=1e-12)
    simple = (A.trace() + B.trace() - 2 * (A.sqrt() @ B.abs().sqrt()).trace()).item()
    assert abs(measured - simple) > 0.1  # roots element by element would be another number


def test_fit_recovers_a_gaussian() -> None:
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]])
    fitted = frechet.fit(torch.randn(50_000, 3) @ mix + 5)
    # The standard error of a covariance's entry is at most 4 sqrt(2/50,000) = 0.025; four of those.
    torch.testing.assert_close(fitted.covariance, (mix.T @ mix).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(fitted.mean, torch.full((3,), 5.0).double(), rtol=0, atol=0.04)


def test_too_few_or_broken_features_are_refused() -> None:
    with pytest.raises(ValueError, match="8 features need more than 8 pictures, got: 8"):
        frechet.fit(torch.randn(8, 8))
    with pytest.raises(ValueError, match="not finite"):
        frechet.fit(torch.tensor([[1.0], [math.nan]]))


# ----- features -------------------------------------------------------------------------------------------------------


def test_shrinking_averages_instead_of_skipping() -> None:
    """A fine chequerboard shrinks to its mean grey; taking single pixels would keep black or white ones."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[:, :, None], 3, 2).astype(np.uint8))
    small = features.prepare(picture, 32)
    assert small.shape == (1, 3, 32, 32)
    assert small[:, :, 4:-4, 4:-4].abs().max() < 0.01  # one of 255 levels is 0.008


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    picture = noise_picture(0)
    levels = features.prepare(picture, TINY_SIZE).add(1).mul(127.5).round()
    np.testing.assert_array_equal(levels[0].permute(1, 2, 0).numpy(), np.asarray(picture))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory)


def test_dcae_features_are_mean_and_deviation_of_the_deepest_grid(model_folder) -> None:
    from sana_sprint.models.autoencoder import AutoencoderDC

    autoencoder = load_model(AutoencoderDC, model_folder / "vae")
    images = torch.cat([features.prepare(noise_picture(i), TINY_SIZE) for i in range(3)])
    with torch.no_grad():
        x = autoencoder.encoder.conv_in(images)
        for stage in autoencoder.encoder.down_blocks:
            x = stage(x)
    expected = torch.cat([x.mean((2, 3)), x.flatten(2).std(2)], dim=1)
    torch.testing.assert_close(features.dcae_features(autoencoder)(images), expected)


# The network that published FIDs are computed with exists in this format only.
@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated:DeprecationWarning")
def test_inception_gets_bytes_of_its_own_size(tmp_path) -> None:
    file = tmp_path / "network.pt"
    network = torch.jit.ScriptModule()
    network.define(
        "def forward(self, images, return_features: bool = False):\n"
        "    return images.float().mean((2, 3)) + (0 if return_features else 1000)\n"
    )
    network.save(str(file))
    extract = features.inception_features(file)
    picture = Image.new("RGB", (640, 480), (255, 128, 0))
    got = features.features_of([picture], extract, size=features.INCEPTION_SIZE)
    assert got[0].tolist() == pytest.approx([255, 128, 0], rel=1e-5)  # fp32 means of 90,000 equal bytes
    (tmp_path / "text.pt").write_text("not a network")
    for name in ("text.pt", "absent.pt"):
        with pytest.raises(ValueError, match=f"cannot read the Inception network .*{name}"):
            features.inception_features(tmp_path / name)


# ----- the judge ------------------------------------------------------------------------------------------------------


@dataclass
class Grey:
    caption: str
    task: str


@dataclass
class Verdict:
    correct: bool
    reason: str = ""


class AlternatingJudge:
    """Every other picture is right; scenes alternate between two tasks every two."""

    @staticmethod
    def evaluation_scenes(count: int) -> list[Grey]:
        return [Grey(f"a cat {i}", ("one", "two")[i // 2 % 2]) for i in range(count)]

    @staticmethod
    def judge_many(pictures, scenes):
        assert len(pictures) == len(scenes)
        return [Verdict(i % 2 == 0, "" if i % 2 == 0 else "wrong") for i in range(len(scenes))]

    @staticmethod
    def summarize(verdicts, scenes):
        return {"one": 0.25, "two": 1.0, "overall": sum(v.correct for v in verdicts) / len(verdicts)}


@pytest.fixture
def judge_module(monkeypatch) -> str:
    module = types.ModuleType("alternating_judge")
    vars(module).update(
        {name: getattr(AlternatingJudge, name) for name in ("evaluation_scenes", "judge_many", "summarize")}
    )
    monkeypatch.setitem(sys.modules, "alternating_judge", module)
    return "alternating_judge"


def test_what_is_no_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_judge cannot be imported"):
        compositional.import_judge("no_such_judge")
    with pytest.raises(
        ValueError, match="json is no judge, it lacks: evaluation_scenes, judge_many, summarize"
    ):
        compositional.import_judge("json")


def test_the_emoji_judge_is_one() -> None:
    judge = compositional.import_judge("recipes.emoji.judge")
    assert len(judge.evaluation_scenes(6)) == 6


def test_compositional_command(model_folder, judge_module, tmp_path) -> None:
    arguments = ("evaluate", "compositional", "-m", model_folder, "--judge", judge_module, "--count", 4)
    lines = succeed(*arguments, "--steps", 1, "--steps", 2, "--out", tmp_path / "sheets").splitlines()
    assert lines[0] == "| model | overall | one | two |"
    assert lines[2:] == ["| 1-step | 50.0% | 25.0% | 100.0% |", "| 2-steps | 50.0% | 25.0% | 100.0% |"]
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        f"{name}.{kind}" for name in ("1-step", "2-steps") for kind in ("png", "tsv")
    }
    verdicts = (tmp_path / "sheets" / "1-step.tsv").read_text().splitlines()
    assert verdicts[1] == "False\ta cat 1\twrong"
    report = json.loads(succeed(*arguments, "--steps", 1, "--json"))
    assert report["scores"] == {"1-step": {"one": 0.25, "two": 1.0, "overall": 0.5}}
    assert report["count"] == 4


def test_pictures_have_consecutive_seeds_whatever_the_batch(model_folder) -> None:
    from sana_sprint import SanaSprintPipeline

    pipeline = SanaSprintPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    done: list[int] = []
    prompts = ["a cat", "a dog", "a tree"]
    pictures = compositional.draw(
        pipeline, prompts, num_steps=1, first_seed=7, batch=2, on_progress=done.append
    )
    assert done == [2, 1]
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, num_inference_steps=1, seed=7 + i).images[0]
        # The same up to the order of sums in a batch: one of 255 levels.
        assert np.abs(np.asarray(alone, int) - np.asarray(pictures[i], int)).max() <= 1


# ----- the commands on folders ----------------------------------------------------------------------------------------


def test_fid_command(model_folder, tmp_path) -> None:
    from sana_sprint.models.autoencoder import AutoencoderDC

    channels = load_model(AutoencoderDC, model_folder / "vae").config.encoder_block_out_channels[-1]
    count = 2 * channels + 4
    for name, brightness in (("one", 1.0), ("same", 1.0), ("dark", 0.3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.asarray(noise_picture(i)) * brightness
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    compare = ("evaluate", "fid", "-m", model_folder, "--json", tmp_path / "one")
    same = json.loads(succeed(*compare, tmp_path / "same"))
    other = json.loads(succeed(*compare, tmp_path / "dark"))
    # Rounding under the root: a relative 1e-16 of a covariance leaves 1e-8 of its trace.
    assert abs(same["fid"]) < 1e-6 * max(1.0, other["fid"])
    assert other["fid"] > 1e-3
    assert (same["dimensions"], same["size"], same["pictures"]) == (2 * channels, TINY_SIZE, [count, count])

    for path in sorted((tmp_path / "dark").iterdir())[2 * channels :]:
        path.unlink()
    assert_refused(call(*compare, tmp_path / "dark"), 1, f"need more than {2 * channels} pictures")
    (tmp_path / "same" / "0.png").write_text("broken")
    assert_refused(call(*compare, tmp_path / "same"), 1, "cannot read the picture", "0.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fid", "absent", "absent"), ["not a folder: absent"]),
        (("fid", ".", ".", "--features", "inception"), ["need --weights"]),
        (("fid", ".", ".", "--weights", "x.pt"), ["--weights is for inception"]),
        (("compositional", "--steps", "0"), ["from 1 to"]),
        (("compositional", "--judge", "no_such_judge"), ["no_such_judge cannot be imported"]),
        (("clip", "."), ["sana-sprint[evaluate]"]),
    ],
)
def test_wrong_calls_are_explained(arguments, words, tmp_path, monkeypatch) -> None:
    noise_picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # importing it raises ModuleNotFoundError
    result = call("evaluate", *arguments)
    assert_refused(result, 1 if arguments[0] == "clip" else 2, *words)


def test_where_the_emoji_judge_is_missing_it_is_said_where_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "recipes.emoji.judge", None)  # as where only the package is installed
    result = call("evaluate", "compositional", "--model", tmp_path / "absent")
    assert_refused(result, 2, "recipes.emoji.judge cannot be imported", "checkout", "--judge")


def test_without_a_command_it_says_what_there_is() -> None:
    assert succeed("evaluate") == succeed("evaluate", "--help")
    assert all(f"  {name} " in succeed("evaluate") for name in ("compositional", "fid", "clip"))


# ----- CLIP -----------------------------------------------------------------------------------------------------------


class FakeClip(torch.nn.Module):
    """Pictures are seen as their mean colour, captions are said as the colour that they name."""

    COLORS = types.MappingProxyType({"red": [1.0, 0, 0], "yellow": [1.0, 1.0, 0], "not red": [-1.0, 0, 0]})

    def encode_image(self, images):
        return images.mean((2, 3))

    def encode_text(self, tokens):
        return tokens


@pytest.fixture
def open_clip(monkeypatch):
    def create(model, *, pretrained, device):
        if pretrained == "absent":
            raise RuntimeError("no such tag")

        def transform(picture):
            return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()

        return FakeClip(), None, transform

    def tokenizer(_):
        return lambda texts: torch.tensor([FakeClip.COLORS[text] for text in texts])

    module = types.ModuleType("open_clip")
    vars(module).update(create_model_and_transforms=create, get_tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "open_clip", module)


def test_clip_command_reads_captions_from_text_files_and_settings(open_clip, tmp_path) -> None:
    red = Image.new("RGB", (8, 8), (200, 0, 0))
    red.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red\n")
    save_png(red, tmp_path / "b.png", {"prompt": "yellow"})
    save_png(red, tmp_path / "c.png", {"prompt": "not red"})
    report = json.loads(succeed("evaluate", "clip", tmp_path, "--json"))
    # Cosines 1, 1/sqrt(2) and -1, which counts as 0.
    assert report["clip"] == pytest.approx(100 * (1 + math.sqrt(0.5)) / 3, rel=1e-5)
    red.save(tmp_path / "d.png")
    assert_refused(call("evaluate", "clip", tmp_path), 1, "d.png has no caption")


def test_clip_without_weights_is_explained(open_clip) -> None:
    with pytest.raises(ValueError, match="cannot load CLIP ViT-L-14 with weights absent: no such tag"):
        captions.clip_scorer("ViT-L-14", "absent")
