"""The three stages end to end in small, and what a run promises: exact resume, equality of processes, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _training import autoencoder_run, colored_square, student_run, teacher_run
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train import config as train_config
from sana_sprint.train import loop
from sana_sprint.train.autoencoder_stage import AutoencoderStage
from sana_sprint.train.conditioning import drop_captions, embed
from sana_sprint.train.config import AnyRun, RunConfig, load_config
from sana_sprint.train.data import open_source, pictures
from sana_sprint.train.latents import cached_latents, shuffled
from sana_sprint.train.state import load_latest
from sana_sprint.train.student_stage import StudentStage
from sana_sprint.train.teacher_stage import TeacherStage
from sana_sprint.trigflow import flow_denoiser
from sana_sprint.weights import load_model

Report = Callable[[str], None]


def parse(values: dict[str, Any]) -> AnyRun:
    return TypeAdapter[AnyRun](RunConfig).validate_python(values)


def silent(_: str) -> None:
    """A report nobody reads."""


def train(values: dict[str, Any]) -> loop.Stage:
    run = parse(values)
    stage: loop.Stage
    if isinstance(run, train_config.AutoencoderRun):
        stage = AutoencoderStage(run)
    elif isinstance(run, train_config.TeacherRun):
        stage = TeacherStage(run, report=silent)
    else:
        stage = StudentStage(run, report=silent)
    loop.run(stage, run, report=silent)
    return stage


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny autoencoder, teacher and student, each trained a few steps."""
    folder = tmp_path_factory.mktemp("chain")
    train(autoencoder_run(folder / "autoencoder"))
    train(teacher_run(folder / "teacher", folder / "autoencoder" / "final"))
    train(student_run(folder / "student", folder / "teacher" / "final"))
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    learner = checkpoint["learner"]
    (player,) = learner["players"].values()
    return {**player["module"], **{f"ema {name}": value for name, value in learner["ema"].items()}}


def test_every_stage_writes_its_log_samples_and_model(chain: Path) -> None:
    for stage, last in (("autoencoder", 3), ("teacher", 3), ("student", 2)):
        entries = [json.loads(line) for line in (chain / stage / "log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, last + 1))
        with Image.open(chain / stage / "samples" / f"{last:08d}.png") as sheet:
            assert sheet.width > 16
    assert {path.name for path in (chain / "student" / "final").iterdir()} == {
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }


def test_exported_autoencoder_gives_latents_of_unit_variance(chain: Path) -> None:
    model = load_model(AutoencoderDC, chain / "autoencoder" / "final")
    image, _ = pictures(open_source("_training:colored_square"), range(512))
    with torch.no_grad():
        latent = model.encode(image) * model.config.scaling_factor
    # The factor is rounded to five digits; fp32 summation order does the rest.
    assert latent.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    chain: Path, tmp_path: Path, optimizer: str
) -> None:
    autoencoder = chain / "autoencoder" / "final"
    values = teacher_run(tmp_path / "whole", autoencoder, steps=4, optimizer=optimizer)
    train(values)

    stopped = parse({**values, "output": str(tmp_path / "stopped")})
    stage = TeacherStage(stopped, report=silent)  # type: ignore[arg-type]  # a teacher's values make a TeacherRun
    real_loss, calls = stage.loss, 0

    def dies_in_its_third_step(part: loop.Part) -> tuple[Tensor, loop.Metrics]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real_loss(part)

    stage.loss = dies_in_its_third_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.run(stage, stopped, report=silent)
    loop.run(TeacherStage(stopped, report=silent), stopped, report=silent)  # type: ignore[arg-type]

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_see_the_whole_batch_once(tmp_path: Path) -> None:
    """One autoencoder step without latent noise is deterministic: two processes must equal one, up to summation order."""
    results = []
    for name, launcher in (
        ("one", [sys.executable]),
        (
            "two",
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
                "29611",
            ],
        ),
    ):
        values = {**autoencoder_run(tmp_path / name, steps=1), "latent_noise": 0.0}
        script = tmp_path / f"{name}.py"
        script.write_text(
            "import sys; sys.path.insert(0, 'tests')\n"
            "from sana_sprint.train import distributed; distributed.start()\n"
            f"from test_training import train; train({values!r}); distributed.stop()\n"
        )
        subprocess.run(
            [*launcher, str(script)], check=True, cwd=Path(__file__).parents[1], env=_environment()
        )
        results.append(weights(tmp_path / name))
    # Adam's first step is the learning rate times the gradient's sign: where a gradient is all rounding error, signs
    # differ, so compare the bulk. Each process alone would see other pictures and differ nearly everywhere.
    one, two = (torch.cat([value.flatten() for value in result.values()]) for result in results)
    assert ((one - two).abs() > 1e-5).float().mean() < 0.01


def _environment() -> dict[str, str]:
    import os

    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}


def test_the_student_starts_equal_to_its_teacher(chain: Path) -> None:
    run = parse(student_run(chain / "fresh", chain / "teacher" / "final"))
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    embeddings = embed(stage.encoder, ["a red square", "a blue square"], instruction=True)
    u, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 1.5])
    context = stage.teacher.encode_caption(embeddings.embeds, embeddings.mask)
    teacher_F = flow_denoiser(lambda x, s: stage.teacher(x, s, context))(u, t)
    for guidance in (4.0, 5.0):
        student_F = stage._student(embeddings, torch.full((2,), guidance))(u, t)
        # Fused and plain attention sum in different orders; otherwise equal.
        torch.testing.assert_close(student_F, teacher_F, rtol=0, atol=1e-5)


def test_guidance_reaches_the_student(chain: Path) -> None:
    """After training, another guidance scale gives another output: with all-zero guidance layers it never could."""
    run = parse(
        {**student_run(chain / "guided", chain / "teacher" / "final", steps=4), "guidance_scales": [1.0, 9.0]}
    )
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    loop.run(stage, run, report=silent)
    first = stage.transformer.get_parameter("time_embed.guidance_embedder.linear_2.weight")
    assert first.abs().max() > 0
    embeddings = embed(stage.encoder, ["a red square"], instruction=False)
    u, t = torch.randn(1, 4, 4, 4), torch.tensor([1.0])
    low, high = (stage._student(embeddings, torch.tensor([w]))(u, t) for w in (1.0, 9.0))
    assert (low - high).abs().max() > 0


def test_hiding_all_but_bos_is_the_empty_prompt(chain: Path) -> None:
    run = parse(student_run(chain / "fresh", chain / "teacher" / "final"))
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    model: SanaTransformer2DModel = stage.teacher
    captioned = embed(stage.encoder, ["a red square"], instruction=True)
    empty = embed(stage.encoder, [""], instruction=False)
    mask = drop_captions(captioned.mask, torch.tensor([True]))
    x, s = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    dropped = model(x, s, model.encode_caption(captioned.embeds, mask))
    expected = model(x, s, model.encode_caption(empty.embeds, empty.mask))
    torch.testing.assert_close(dropped, expected, rtol=0, atol=1e-5)  # fp32 rounding through the text encoder


def test_non_finite_steps_change_nothing_and_then_stop_the_run(tmp_path: Path) -> None:
    run = parse(autoencoder_run(tmp_path, steps=30))
    stage = AutoencoderStage(run)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in stage.module.state_dict().items()}
    real_loss = stage.loss

    def broken(part: loop.Part) -> tuple[Tensor, loop.Metrics]:
        loss, metrics = real_loss(part)
        return loss * float("nan"), metrics

    stage.loss = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="20 steps in a row were not finite, the last at step 19"):
        loop.run(stage, run, report=silent)
    assert all(torch.equal(before[name], value) for name, value in stage.module.state_dict().items())


def test_cached_latents_are_reused_only_for_the_same_autoencoder(chain: Path, tmp_path: Path) -> None:
    model = load_model(AutoencoderDC, chain / "autoencoder" / "final")
    source = "_training:colored_square"
    first = cached_latents(tmp_path, source, 8, model, report=silent)
    again = cached_latents(tmp_path, source, 8, model, report=silent)
    assert torch.equal(first.latents, again.latents)
    assert first.captions == [[colored_square(i)[1]] for i in range(8)]
    assert len(list(tmp_path.glob("latents-*"))) == 1
    with torch.no_grad():
        next(model.encoder.parameters()).add_(0.1)
    changed = cached_latents(tmp_path, source, 8, model, report=silent)
    assert not torch.equal(first.latents, changed.latents)


def test_shuffling_visits_every_sample_once_an_epoch() -> None:
    order = shuffled(range(20), 10, seed=3).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert shuffled(range(7, 12), 10, seed=3).tolist() == order[7:12]


def test_a_folder_of_pictures_and_captions_is_a_source(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a red picture\n")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "two.png")
    source = open_source(str(tmp_path))
    assert [source(i)[1] for i in range(3)] == [("a red picture",), ("",), ("a red picture",)]
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        open_source(str(tmp_path))(0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "neither a folder nor"),
        ("_training:nothing", "cannot be imported"),
        ("tests", "no pictures"),
    ],
)
def test_bad_sources_are_named(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_recipes_are_valid_and_overrides_apply() -> None:
    recipes = sorted(Path(__file__).parents[1].glob("recipes/emoji/*.toml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        load_config(recipe)
    run = load_config(recipes[0], ["schedule.steps=7", "output=elsewhere"])
    assert run.schedule.steps == 7
    assert run.output == Path("elsewhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.stepz=3", "stepz"),
        ("schedule.steps=0", "greater than or equal to 1"),
        ("nonsense", "KEY=VALUE"),
        ("seed.x=1", "is a value, not a section"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    recipe = Path(__file__).parents[1] / "recipes/emoji/autoencoder.toml"
    with pytest.raises(ValueError, match=message):
        load_config(recipe, ["seed=0", override])


def test_the_moving_average_warms_up_and_follows() -> None:
    from sana_sprint.train.state import EMA

    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = EMA(module, 0.9)
    nn.init.ones_(module.weight)
    ema.update(module, 0)
    assert ema.weights["weight"].item() == pytest.approx(1 - 1 / 10)  # decay (1 + 0) / (10 + 0)
    ema.swap(module)
    assert module.weight.item() == pytest.approx(0.9)
