"""All stages end to end in small: what they write, how they resume, and what the student starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.train import loop
from sana_sprint.train.data import open_source, pictures
from sana_sprint.train.models.base import velocity_of
from sana_sprint.train.stages.captions import drop_captions, embed
from sana_sprint.train.stages.student import StudentStage
from sana_sprint.trigflow import Denoiser, flow_denoiser
from sana_sprint.weights import load_model
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import (
    adaptation_run,
    autoencoder_run,
    hybrid_run,
    make,
    parse,
    silent,
    student_run,
    teacher_run,
    train,
)
from tests.helpers.training import chain as made_chain


@pytest.fixture
def chain() -> Path:
    return made_chain()


def test_every_stage_writes_its_log_samples_and_model(chain: Path) -> None:
    for stage, last in (("autoencoder", 3), ("teacher", 3), ("adaptation", 2), ("student", 4)):
        entries = [json.loads(line) for line in (chain / stage / "log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in entries if "skipped_steps" in entry] == list(range(1, last + 1))
        for step in (0, last):
            with Image.open(chain / stage / "samples" / f"{step:08d}.png") as sheet:
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
    image, _ = pictures(open_source("tests.helpers.training:colored_square"), range(512))
    with torch.no_grad():
        latent = model.encode(image) * model.config.scaling_factor
    # The factor is rounded to five digits; fp32 summation order does the rest.
    assert latent.std().item() == pytest.approx(1, abs=1e-3)


def runs(chain: Path) -> dict[str, dict[str, Any]]:
    teacher = chain / "teacher" / "final"
    return {
        "autoencoder": autoencoder_run(chain, steps=4),
        "teacher": teacher_run(chain, chain / "autoencoder" / "final", steps=4),
        "adaptation": adaptation_run(chain, teacher, steps=4),
        "student": student_run(chain, teacher, steps=4),
        "hybrid": hybrid_run(chain, teacher, steps=4, r1_weight=0.1),
    }


@pytest.mark.parametrize("name", ["autoencoder", "teacher", "adaptation", "student", "hybrid"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(chain: Path, tmp_path: Path, name: str) -> None:
    values = runs(chain)[name]
    train({**values, "output": str(tmp_path / "whole")})
    stopped = parse({**values, "output": str(tmp_path / "stopped")})
    # The third step's turn: inside the alternation of a hybrid run.
    answers = iter([False, False, True])
    assert not loop.run(make(stopped), stopped, report=silent, should_stop=lambda: next(answers))
    loop.run(make(stopped), stopped, report=silent)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_gradient_checkpointing_changes_no_number(chain: Path, tmp_path: Path) -> None:
    for name in ("teacher", "hybrid"):
        values = runs(chain)[name]
        for kept in (True, False):
            output = str(tmp_path / f"{name}-{kept}")
            train({**values, "output": output, "gradient_checkpointing": not kept})
        assert_same(tmp_path / f"{name}-True", tmp_path / f"{name}-False")


def denoiser(stage: StudentStage, context: CaptionContext, guidance: torch.Tensor) -> Denoiser:
    return flow_denoiser(velocity_of(stage.models.student, context, guidance))


def test_the_student_starts_equal_to_its_teacher(chain: Path) -> None:
    run = parse(student_run(chain / "fresh", chain / "teacher" / "final"))
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    embeddings = embed(stage.source.encoder, ["a red square", "a blue square"], instruction=True)
    u, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 1.5])
    context = stage.models.teacher.encode_caption(embeddings.embeds, embeddings.mask)
    teacher_F = flow_denoiser(lambda x, s: stage.models.teacher(x, s, context))(u, t)
    for guidance in (4.0, 5.0):
        told = stage.models.validation_context(stage.models.student, embeddings.embeds, embeddings.mask)
        student_F = denoiser(stage, told, torch.full((2,), guidance))(u, t)
        # Fused and plain attention sum in different orders; otherwise equal.
        torch.testing.assert_close(student_F, teacher_F, rtol=0, atol=1e-5)


def test_guidance_reaches_the_student(chain: Path) -> None:
    """After training, another guidance scale gives another output: with all-zero guidance layers it never could."""
    run = parse(
        {**student_run(chain / "guided", chain / "teacher" / "final", steps=4), "guidance_scales": [1.0, 9.0]}
    )
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    loop.run(stage, run, report=silent)
    first = stage.models.student.get_parameter("time_embed.guidance_embedder.linear_2.weight")
    assert first.abs().max() > 0
    embeddings = embed(stage.source.encoder, ["a red square"], instruction=False)
    u, t = torch.randn(1, 4, 4, 4), torch.tensor([1.0])
    told = stage.models.validation_context(stage.models.student, embeddings.embeds, embeddings.mask)
    low, high = (denoiser(stage, told, torch.tensor([w]))(u, t) for w in (1.0, 9.0))
    assert (low - high).abs().max() > 0


def test_hiding_all_but_bos_is_the_empty_prompt(chain: Path) -> None:
    run = parse(student_run(chain / "fresh", chain / "teacher" / "final"))
    stage = StudentStage(run, report=silent)  # type: ignore[arg-type]
    model: SanaTransformer2DModel = stage.models.teacher
    captioned = embed(stage.source.encoder, ["a red square"], instruction=True)
    empty = embed(stage.source.encoder, [""], instruction=False)
    mask = drop_captions(captioned.mask, torch.tensor([True]))
    x, s = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    dropped = model(x, s, model.encode_caption(captioned.embeds, mask))
    expected = model(x, s, model.encode_caption(empty.embeds, empty.mask))
    torch.testing.assert_close(dropped, expected, rtol=0, atol=1e-5)  # fp32 rounding through the text encoder
