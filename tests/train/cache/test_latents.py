"""Latents are computed once, are what the autoencoder gives, and are met again only by whom they fit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.resolutions import nearest_bucket
from sana_sprint.train.cache import files as parts
from sana_sprint.train.cache import latents
from sana_sprint.train.cache.latents import LatentCache, cached_latents
from sana_sprint.train.data import fit, pictures
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.cli import subprocess_settings
from tests.helpers.data import pixels, png, write_folder

SIZE = 16  # native side; the tiny autoencoder shrinks by 4
SHAPES = [(16, 16), (30, 16), (16, 16), (16, 24), (31, 17), (16, 16), (16, 16), (16, 32), (32, 16), (9, 9)]


def pictures_of(shapes: Sequence[tuple[int, int]]) -> list[bytes]:
    return [png(i, shape) for i, shape in enumerate(shapes)]


@pytest.fixture
def autoencoder() -> AutoencoderDC:
    return tiny_autoencoder("published")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of several shapes, the first with two captions."""
    texts = [[f"picture {i}", *(["the first"] if i == 0 else [])] for i in range(len(SHAPES))]
    return write_folder(tmp_path / "pictures", pictures_of(SHAPES), texts)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_SIZE", 4)


def cached(folder: Path, autoencoder: AutoencoderDC, **settings: Any) -> tuple[LatentCache, list[str]]:
    """The cache beside a folder of pictures, and what was reported."""
    said: list[str] = []
    settings = {"size": SIZE, **settings}
    count = settings.pop("num_samples", 100)
    source = settings.pop("source", str(folder))
    return cached_latents(folder.parent, source, count, autoencoder, report=said.append, **settings), said


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder.parent / "latents").iterdir()}


def everything(cache: LatentCache) -> dict[str, torch.Tensor]:
    """Latents by caption: the order in the cache is its own business."""
    return {cache.captions[i][0]: cache.batch(torch.tensor([i]))[0][0] for i in range(len(cache))}


def test_latents_are_the_autoencoders(folder: Path, autoencoder: AutoencoderDC) -> None:
    cache, said = cached(folder, autoencoder)
    assert len(cache) == len(SHAPES)
    assert said == [
        f"latents: 10 of 10 in {folder.parent / 'latents'}, in {len(cache.buckets)} shapes; "
        "0 unreadable, 0 without caption"
    ]
    for i, (width, height) in enumerate(SHAPES):
        bucket = nearest_bucket(height, width, SIZE, 4)
        image, _ = pictures(lambda i: (fit(pixels(png(i, SHAPES[i])), *bucket), ("",)), [i])  # noqa: B023
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = autoencoder.encode(image)[0].float() * autoencoder.config.scaling_factor
        # The file has 8 significant bits, and so have the sums inside, whose order may depend on the batch.
        torch.testing.assert_close(everything(cache)[f"picture {i}"], expected, rtol=0.02, atol=0.02)


def test_each_caption_of_a_picture_is_drawn(folder: Path, autoencoder: AutoencoderDC) -> None:
    cache, _ = cached(folder, autoencoder)
    index = [texts[0] for texts in cache.captions].index("picture 0")
    drawn = cache.batch(torch.full((64,), index))[1]
    assert (
        16 < drawn.count("the first") < 48
    )  # a fair coin leaves this once in 10^4 seeds, and the seed is fixed
    assert set(drawn) == {"picture 0", "the first"}


def test_batches_of_training_have_one_shape_and_see_every_picture(
    folder: Path, autoencoder: AutoencoderDC
) -> None:
    cache, _ = cached(folder, autoencoder)
    assert cache.shape == (4, 4, 4)
    seen = set()
    for step in range(30):
        chosen = cache.shuffled(range(2 * step, 2 * step + 2), batch_size=2, seed=0)
        latent, _ = cache.batch(chosen)
        assert latent.dtype == torch.float32
        assert (4, latent.shape[2] * 4, latent.shape[3] * 4)[1:] in {
            nearest_bucket(height, width, SIZE, 4) for width, height in SHAPES
        }
        seen.update(chosen.tolist())
    assert seen == set(range(len(SHAPES)))
    with pytest.raises(ValueError, match="one shape"):
        cache.batch(torch.arange(len(cache)))


@pytest.mark.usefixtures("small_parts")
def test_a_stopped_encoding_goes_on_where_it_was(
    folder: Path, autoencoder: AutoencoderDC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = cached(folder, autoencoder)
    elsewhere = write_folder(tmp_path / "moved" / "set", [], [])
    for path in folder.iterdir():
        path.rename(elsewhere / path.name)
    encode, encoded = AutoencoderDC.encode, 0

    def counted(self: AutoencoderDC, images: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(images)
        if encoded > 7:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(AutoencoderDC, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        cached(elsewhere, autoencoder)
    assert len(files(elsewhere)) == 1  # the second part was not finished, and is not there
    encoded = -100
    resumed, _ = cached(elsewhere, autoencoder)
    assert encoded == -100 + len(SHAPES) - 4
    assert files(elsewhere) == files(folder)
    expected, found = everything(whole), everything(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.usefixtures("small_parts")
def test_only_what_changed_is_encoded_again(folder: Path, autoencoder: AutoencoderDC) -> None:
    cached(folder, autoencoder)
    before = files(folder)
    assert len(before) == 3
    (folder / "9999.png").write_bytes(png(99, (16, 16)))
    (folder / "9999.txt").write_text("a new one")
    cache, _ = cached(folder, autoencoder)
    assert len(cache) == len(SHAPES) + 1
    assert len(files(folder) - before) == 1  # the last part has grown
    cached(folder, autoencoder, num_samples=8)
    assert len(files(folder) - before) == 1


def _recoloured(folder: Path) -> None:
    """One pixel of one picture; name, size in bytes and time of change stay."""
    import os

    path = folder / "0006.png"
    times, old = path.stat(), path.read_bytes()
    changed = next(
        data
        for data in (png(6, (16, 16))[:-20] + bytes([i]) + png(6, (16, 16))[-19:] for i in range(256))
        if data != old
    )
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder, _: _recoloured(folder),
        lambda folder, _: (folder / "0003.txt").write_text("other words"),
        lambda _, model: next(model.encoder.parameters()).data.add_(1e-3),
        lambda _, model: setattr(model, "config", dataclasses.replace(model.config, scaling_factor=0.5)),
        lambda _, model: model.double(),
    ],
    ids=["picture", "caption", "weights", "config", "dtype"],
)
def test_stale_latents_are_never_met(change: Any, folder: Path, autoencoder: AutoencoderDC) -> None:
    def key(size: int | None = SIZE) -> str:
        (path,), _ = latents.latent_files(
            folder, latents.open_source(str(folder)), len(SHAPES), autoencoder, size
        )
        return path.name

    before = key()
    assert key() == before != key(size=32)
    change(folder, autoencoder)
    assert key() != before


def test_the_cache_tells_what_it_was_made_from(folder: Path, autoencoder: AutoencoderDC) -> None:
    def changed(before: dict[str, str]) -> set[str]:
        now = cached(folder, autoencoder)[0].facts
        return {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}

    facts = dict(cached(folder, autoencoder)[0].facts)
    assert facts["samples"] == "10"
    assert changed(facts) == set()
    (folder / "0003.txt").write_text("other words")
    assert changed(facts) == {"pictures and captions"}
    (folder / "0003.txt").write_text("picture 3\n")
    next(autoencoder.encoder.parameters()).data.add_(1e-3)
    assert changed(facts) == {"autoencoder and size"}
    (folder / "9999.png").write_bytes(png(99, (16, 16)))
    (folder / "9999.txt").write_text("a new one")
    assert changed(facts) == {"samples", "pictures and captions", "autoencoder and size"}


def test_latents_stay_on_disk(folder: Path, autoencoder: AutoencoderDC) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("only Linux tells what is mapped")
    cache, _ = cached(folder, autoencoder)
    (name,) = files(folder)
    assert name in maps.read_text()
    del cache


def test_a_function_that_draws_fitting_pictures_needs_no_size(
    tmp_path: Path, autoencoder: AutoencoderDC
) -> None:
    source = "tests.helpers.training:colored_square"
    cache, _ = cached(tmp_path / "x", autoencoder, source=source, size=None, num_samples=6)
    assert cache.captions == [[f"a {name} square"] for name in ["red", "green", "blue"] * 2]
    (block,) = cache.blocks
    assert block.shape == (6, 4, 4, 4)
    again, _ = cached(tmp_path / "x", autoencoder, source=source, size=None, num_samples=6)
    assert torch.equal(block, again.blocks[0])
    assert len(files(tmp_path / "x")) == 1


def test_pictures_that_do_not_fit_need_a_size(folder: Path, autoencoder: AutoencoderDC) -> None:
    with pytest.raises(ValueError, match=r"0001\.png has 30x16 pixels.*set a size, a multiple of 4"):
        cached(folder, autoencoder, size=None)


def test_the_unreadable_and_the_uncaptioned_are_told_each_time(
    folder: Path, autoencoder: AutoencoderDC
) -> None:
    (folder / "0004.png").write_bytes(b"no picture")
    (folder / "0005.txt").unlink()
    for _ in range(2):
        cache, said = cached(folder, autoencoder, max_bad=0.1)
        assert len(cache) == len(SHAPES) - 1
        assert said[0] == f"skipped {folder / '0004.png'}: no picture that can be decoded"
        assert said[1].endswith("1 unreadable, 1 without caption")
    (folder / "0007.txt").write_text(" \n")
    with pytest.raises(
        ValueError, match=r"2 of 10 samples cannot be used, more than 10\.0%.*0005\.png: no caption"
    ):
        cached(folder, autoencoder, max_bad=0.1)
    with pytest.raises(ValueError, match=r"1 of 10 samples.*0004\.png: no picture"):
        cached(folder, autoencoder, max_bad=0.0)


@pytest.mark.usefixtures("small_parts")
def test_too_many_unreadable_pictures_stop_early(folder: Path, autoencoder: AutoencoderDC) -> None:
    for i in (1, 2):
        (folder / f"{i:04d}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="2 of 10 samples"):
        cached(folder, autoencoder)
    assert len(files(folder)) == 1


PROCESS = """
import sys
from pathlib import Path
from torch import distributed
from sana_sprint.train.cache import latents
from sana_sprint.train.cache import files as parts
from tests.helpers.autoencoders import tiny_autoencoder
parts.PART_SIZE = 4
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder.parent}/meeting", rank=rank, world_size=2)
write = parts.write_part
latents.write_part = lambda path, *rest: (write(path, *rest), print(path.name))
autoencoder = tiny_autoencoder("published")
cache = latents.cached_latents(folder.parent, str(folder), 100, autoencoder, report=lambda _: None, size=16)
print(len(cache), cache.captions[9][0])
distributed.destroy_process_group()
"""


def test_two_processes_share_the_work(folder: Path, autoencoder: AutoencoderDC) -> None:
    command = [sys.executable, "-c", PROCESS]
    root = str(Path(__file__).parents[3])
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            cwd=root,
            env=subprocess_settings(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [len(lines) for lines in said] == [3, 2]  # parts 0 and 2, part 1; and the size of the whole
    assert {name for lines in said for name in lines[:-1]} == files(folder)
    assert said[0][-1] == said[1][-1]
    assert said[0][-1].startswith("10 ")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(parts.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        parts.write_part(tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {})
    assert not list(tmp_path.iterdir())
