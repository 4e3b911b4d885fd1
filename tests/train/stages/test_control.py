"""Training control branches: what learns and what must not move, the tangent through a branch, and conditions."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.resolutions import nearest_bucket
from sana_sprint.train import loop
from sana_sprint.train.cache import files as parts
from sana_sprint.train.cache.latents import LatentCache, latents_of_run
from sana_sprint.train.data import fit, open_source
from sana_sprint.train.data.pictures import to_tensor
from sana_sprint.train.losses import forward_mode as dual
from sana_sprint.train.losses import tangent
from sana_sprint.train.losses.flow import flow_loss
from sana_sprint.train.losses.forward_mode import Dual
from sana_sprint.train.models.controlled import ConditionSource, ControlledContext, ControlledTransformer
from sana_sprint.train.stages.captions import embed
from sana_sprint.train.stages.control import Conditions, ControlStudentStage, ControlTeacherStage
from sana_sprint.weights import load_model, save_model
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.data import png, write_folder
from tests.helpers.models import randomize, tiny_transformer, transformer_inputs
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import chain as made_chain
from tests.helpers.training import (
    control_student_run,
    control_teacher_run,
    make,
    parse,
    silent,
    train,
)

TOPOLOGIES = ("diffusers", "official")


@pytest.fixture
def chain() -> Path:
    return made_chain()


# --- The tangent ---------------------------------------------------------------------------------------------------


def controlled(topology: str, *, fresh: bool = False, **branch: Any) -> ControlledTransformer:
    """A student and the branch of a teacher, which has no guidance embedding, in fp64."""
    transformer = tiny_transformer("sprint", timestep_scale=0.001)
    teacher = tiny_transformer("teacher", timestep_scale=branch.pop("timestep_scale", 0.001), seed=1)
    source = transformer if branch.pop("guided", False) else teacher
    controlnet = SanaControlNetModel.from_transformer(source, num_layers=2, topology=topology)
    if not fresh:
        randomize(controlnet, seed=5)
    return ControlledTransformer(transformer.double(), controlnet.double().eval())


def inputs_of(model: ControlledTransformer) -> tuple[tuple[Tensor, Tensor], ControlledContext, Tensor]:
    """((latent, time), context with a masked caption, guidance), in fp64."""
    inputs = transformer_inputs(model.config, batch=3, grid=(4, 6), tokens=5)
    with torch.no_grad():
        context = model.encode(
            torch.randn(3, 4, 4, 6, dtype=torch.float64), inputs["text"].double(), inputs["text_mask"]
        )
    return (inputs["latent"].double(), inputs["timestep"].double()), context, inputs["guidance"].double()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("branch", [{}, {"fresh": True}, {"guided": True}, {"timestep_scale": 0.002}])
def test_the_dual_pass_is_differentiated_through_the_branch(topology: str, branch: dict[str, Any]) -> None:
    model = controlled(topology, **branch)
    point, context, guidance = inputs_of(model)
    direction = tuple(torch.randn_like(each) for each in point)
    h = 1e-6
    with torch.no_grad():
        actual = dual.transform(model, *map(Dual, point, direction), context, guidance)
        set_fused_attention(model.blocks, False)
        expected = torch.func.jvp(lambda x, s: model(x, s, context, guidance), point, direction)
        ahead, behind = (
            model(*(p + step * d for p, d in zip(point, direction, strict=True)), context, guidance)
            for step in (h, -h)
        )
    # The same sums in another order: fp64's 1e-16, grown by cancellation.
    assert relative(actual.value, expected[0]) < 1e-10
    assert relative(actual.tangent, expected[1]) < 1e-10
    # Truncation of h^2 = 1e-12 times third derivatives, and fp64's rounding over h.
    assert relative(actual.tangent, (ahead - behind) / (2 * h)) < 1e-7
    assert not actual.tangent.requires_grad


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_fresh_branch_leaves_value_and_tangent_as_they_are(topology: str) -> None:
    model = controlled(topology, fresh=True)
    point, context, guidance = inputs_of(model)
    duals = [Dual(each, torch.ones_like(each)) for each in point]
    with torch.no_grad():
        assert torch.equal(model(*point, context, guidance), model.transformer(*point, context, guidance))
    for with_branch, without in zip(
        dual.transform(model, *duals, context, guidance),
        dual.transform(model.transformer, *duals, context, guidance),
        strict=True,
    ):
        assert torch.equal(with_branch, without)


def test_the_other_kinds_of_tangent_go_through_the_branch_too() -> None:
    model = controlled("diffusers")
    for part in (model.transformer, model.controlnet):
        part.float()
    inputs = transformer_inputs(model.config, batch=3, grid=(4, 6), tokens=5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        context = model.encode(torch.randn(3, 4, 4, 6), inputs["text"])
    assert context.control.captions.keys[0].dtype == torch.bfloat16
    arguments = (
        context,
        inputs["latent"],
        torch.tensor([0.2, 0.9, 1.5]),
        torch.randn_like(inputs["latent"]),
        inputs["guidance"],
    )
    expected = tangent.make_tangent("dual")(model, *arguments)
    # fp32's 1e-7, a hundred times over.
    assert relative(tangent.make_tangent("jvp")(model, *arguments), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        difference = tangent.make_tangent("difference")(model, *arguments)
    assert (
        relative(difference, expected) < 1e-2
    )  # 1e-3 of truncation; a bf16 pass of the branch would be off by 100%


def test_rows_of_a_context_keep_their_condition() -> None:
    model = controlled("diffusers")
    point, context, guidance = inputs_of(model)
    rows = torch.tensor([2, 0, 2])
    with torch.no_grad():
        expected = model(*point, context, guidance)[rows]
        actual = model(*(each[rows] for each in point), context.index(rows), guidance[rows])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # fp64; a batch sums in another order


# --- The two stages ------------------------------------------------------------------------------------------------


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def is_same(module: nn.Module, other: Mapping[str, Tensor] | nn.Module) -> bool:
    expected = other.state_dict() if isinstance(other, nn.Module) else other
    found = module.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_branch_follows_the_teacher(chain: Path, tmp_path: Path) -> None:
    stage = make(parse(control_teacher_run(tmp_path / "run", chain)))
    assert isinstance(stage, ControlTeacherStage)
    embeddings = embed(stage.encoder, ["a red square", "a blue square"], instruction=True)
    context = stage.context(torch.tensor([3, 4]), embeddings.embeds, embeddings.mask)
    x, s = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9])
    alone = load_model(SanaTransformer2DModel, chain / "teacher" / "final" / "transformer")
    with torch.no_grad():
        expected = alone(x, s, alone.encode_caption(embeddings.embeds, embeddings.mask))
        assert torch.equal(stage.velocity(context)(x, s), expected)


def test_the_first_stage_moves_the_branch_alone_and_writes_it(chain: Path, tmp_path: Path) -> None:
    teacher = chain / "teacher" / "final"
    stage = train(control_teacher_run(tmp_path / "run", chain))
    assert isinstance(stage, ControlTeacherStage)
    assert is_same(stage.transformer, load_model(SanaTransformer2DModel, teacher / "transformer"))
    assert is_same(stage.autoencoder, load_model(AutoencoderDC, teacher / "vae"))
    final = tmp_path / "run" / "final"
    assert {path.name for path in final.iterdir()} == {"controlnet"}
    branch = load_model(SanaControlNetModel, final / "controlnet")
    fresh = SanaControlNetModel.from_transformer(stage.transformer, num_layers=1)
    unmoved = [
        name for name, value in fresh.state_dict().items() if torch.equal(branch.state_dict()[name], value)
    ]
    assert not [name for name in unmoved if name.startswith(("controlnet_blocks", "transformer_blocks"))]
    samples = tmp_path / "run" / "samples"
    with Image.open(samples / "conditions.png") as sheet, Image.open(samples / "00000003.png") as drawn:
        assert sheet.size == drawn.size


def test_the_second_stage_starts_from_the_first_and_moves_its_branch_alone(
    chain: Path, tmp_path: Path
) -> None:
    run = parse(control_student_run(tmp_path / "run", chain))
    stage = make(run)
    assert isinstance(stage, ControlStudentStage)
    teacher, student = stage.models.teacher, stage.models.student
    assert isinstance(teacher, ControlledTransformer)
    assert isinstance(student, ControlledTransformer)
    first = load_model(SanaControlNetModel, chain / "control-teacher" / "final" / "controlnet")
    assert is_same(student.controlnet, first)
    assert is_same(teacher.controlnet, first)
    before = [weights(teacher.transformer), weights(student.transformer)]
    assert loop.run(stage, run, report=silent)
    assert is_same(teacher.controlnet, first)
    assert not is_same(student.controlnet, first)
    assert [
        is_same(model.transformer, old) for model, old in zip((teacher, student), before, strict=True)
    ] == [
        True,
        True,
    ]


def test_the_exported_folder_is_the_student_with_a_branch(chain: Path, tmp_path: Path) -> None:
    student, final = chain / "student" / "final", chain / "control-student" / "final"
    files = contents(final)
    assert {name: data for name, data in files.items() if not name.startswith("controlnet/")} == contents(
        student
    )
    sketches = []
    for left in (1, 7):
        mask = np.zeros((16, 16, 3), np.uint8)
        mask[4:12, left : left + 8] = 255
        sketches.append(Image.fromarray(mask))
    pipe = SanaSprintControlNetPipeline.from_pretrained(final)
    assert pipe.controlnet.dtype == torch.bfloat16
    randomize(pipe.controlnet)  # that of a few steps moves no pixel by a whole level
    drawn = [
        np.asarray(pipe("a red square", image=sketch, num_inference_steps=2, seed=3).images[0], np.int64)
        for sketch in sketches
    ]
    assert (drawn[0] != drawn[1]).any()
    text, before = (
        SanaSprintPipeline.from_pretrained(folder)("a red square", num_inference_steps=2, seed=3).images[0]
        for folder in (final, student)
    )
    assert text.tobytes() == before.tobytes()


@pytest.mark.parametrize("values", [control_teacher_run, control_student_run])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(chain: Path, tmp_path: Path, values: Any) -> None:
    train(values(tmp_path / "whole", chain, steps=4))
    stopped = parse(values(tmp_path / "stopped", chain, steps=4))
    answers = iter([False, False, True])
    assert not loop.run(make(stopped), stopped, report=silent, should_stop=lambda: next(answers))
    loop.run(make(stopped), stopped, report=silent)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("values", [control_teacher_run, control_student_run])
def test_gradient_checkpointing_changes_no_number(chain: Path, tmp_path: Path, values: Any) -> None:
    for checkpointing in (True, False):
        output = tmp_path / str(checkpointing)
        train({**values(output, chain, steps=2), "gradient_checkpointing": checkpointing})
    assert_same(tmp_path / "True", tmp_path / "False")


def test_a_branch_learns_to_follow_a_few_conditions(chain: Path, tmp_path: Path) -> None:
    # A teacher of random weights, because that of a few steps still gives zero whatever its tokens are.
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(chain / "teacher" / "final" / part, tmp_path / "teacher" / "final" / part)
    transformer = load_model(SanaTransformer2DModel, chain / "teacher" / "final" / "transformer")
    randomize(transformer)
    save_model(transformer, tmp_path / "teacher" / "final" / "transformer")
    values = control_teacher_run(tmp_path / "run", tmp_path, steps=60)
    values["data"]["num_samples"] = 4
    values["optimizer"]["learning_rate"] = 1e-2
    values["schedule"]["save_every"] = values["schedule"]["log_every"] = 60
    run = parse(
        {**values, "caption_dropout": 1.0}
    )  # so that nothing but the condition tells the samples apart
    stage = make(run)
    assert isinstance(stage, ControlTeacherStage)

    def loss(*conditions: int) -> float:
        """On all four samples, told these conditions; of fixed noise at fixed times."""
        u0 = stage.cache.latents(torch.arange(4)).repeat(8, 1, 1, 1)
        generator = torch.Generator().manual_seed(0)
        noise, flow_t = torch.randn(u0.shape, generator=generator), torch.rand(32, generator=generator)
        embeddings = embed(stage.encoder, [""] * 32, instruction=False)
        context = stage.context(torch.tensor(conditions * 8), embeddings.embeds, embeddings.mask)
        with torch.no_grad():
            return flow_loss(stage.velocity(context), u0, noise, flow_t).mean().item()

    before = loss(0, 1, 2, 3)
    assert loss(1, 2, 3, 0) == before
    loop.run(stage, run, report=silent)
    after, misled = loss(0, 1, 2, 3), loss(1, 2, 3, 0)
    assert after < before / 4
    assert after < misled / 1.5


# --- Conditions ----------------------------------------------------------------------------------------------------


def inverted(pixels: np.ndarray, position: int) -> np.ndarray:
    """A condition that tells which picture it is of."""
    return 255 - pixels


def numbered(pixels: np.ndarray, position: int) -> np.ndarray:
    """A condition that tells where in the set its picture is."""
    return np.full_like(pixels, position)


def grey(pixels: np.ndarray, position: int) -> np.ndarray:
    return pixels[..., 0]


def bright(pixels: np.ndarray, position: int) -> np.ndarray:
    return pixels / 255


def framed(side: int) -> np.ndarray:
    """A white square in the middle of a black picture."""
    return np.pad(np.full((side // 2,) * 2 + (3,), 255, np.uint8), ((side // 4,) * 2,) * 2 + ((0, 0),))


SHAPES = [
    (16, 16),
    (16, 16),
    (30, 16),
    (16, 16),
    (31, 17),
    (16, 30),
    (20, 20),
    (16, 31),
    (8, 8),
]  # width, height


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several sizes and shapes, named by their captions; the first and the fifth are corrupt."""
    files = [png(i, shape) for i, shape in enumerate(SHAPES)]
    files[0] = files[4] = b"no picture"
    return write_folder(tmp_path / "pictures", files, [[f"picture {i}"] for i in range(len(files))])


def caches(folder: Path, condition: str) -> tuple[LatentCache, Conditions, AutoencoderDC]:
    """The latents of a folder's pictures and of their conditions."""
    autoencoder = tiny_autoencoder("published")
    values = control_teacher_run(folder.parent / "run", folder)
    values["data"] = {"source": str(folder), "size": 16, "max_bad_fraction": 0.3}
    run: Any = parse(values)
    cache, _ = latents_of_run(run, autoencoder, num_validation=1, report=silent)
    return cache, Conditions(run, condition, cache, autoencoder, report=silent), autoencoder


def test_conditions_line_up_with_their_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_SIZE", 4)  # so that parts begin with a corrupt picture
    cache, found, autoencoder = caches(folder, f"{__name__}:inverted")
    assert len(cache) == len(SHAPES) - 2
    assert len(cache.buckets) == 3
    assert found.cache.captions == cache.captions
    source = open_source(str(folder))
    for index, (caption,) in enumerate(cache.captions):
        pixels = source.sample(int(caption.split()[1]))[0]
        condition = inverted(fit(pixels, *nearest_bucket(*pixels.shape[:2], 16, 4)), 0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = autoencoder.encode(to_tensor([condition])).float() * autoencoder.config.scaling_factor
        # The file has 8 significant bits, and so have the sums inside, whose order may depend on the batch.
        torch.testing.assert_close(found.latents(torch.tensor([index])), expected, rtol=0.02, atol=0.02)
    # A batch is of one shape, and so are its conditions.
    order = cache.shuffled(range(2), batch_size=2, seed=0)
    assert found.latents(order).shape == cache.latents(order).shape
    # Validation shows pictures of any size in the shape of most samples.
    assert found.validation[:5].shape == (5, *cache.shape)


def test_a_function_is_told_the_place_in_the_set(folder: Path) -> None:
    source = ConditionSource(open_source(str(folder)), f"{__name__}:numbered", size=16, multiple=4)
    for position in (1, 7):
        condition, captions = source.sample(position)
        assert captions == (f"picture {position}",)
        assert (condition == position).all()
        assert condition.shape[:2] == nearest_bucket(*SHAPES[position][::-1], 16, 4)


def test_a_kind_makes_conditions_of_fitted_pictures() -> None:
    source = open_source("tests.helpers.training:colored_square")
    source.function = lambda index: framed(256)  # type: ignore[attr-defined]
    edges = ConditionSource(source, "canny", size=32, multiple=4).sample(1)[0]
    assert edges.shape == (32, 32, 3)
    # Found after the picture has shrunk, a line is as thin and as white as in use; else it would have shrunk too.
    assert set(np.unique(edges)) == {0, 255}
    assert 0 < (edges[..., 0] > 0).mean() < 0.2


@pytest.mark.parametrize("kind", ["scribble", "canny", "softedge"])
def test_an_even_picture_has_a_black_condition(kind: str) -> None:
    make_condition = ConditionSource(open_source("tests.helpers.training:colored_square"), kind).condition
    even = np.full((16, 24, 3), 77, np.uint8)
    assert not make_condition(even, 0).any()
    assert make_condition(framed(24), 0).any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edges", "kind must be one of scribble, canny, softedge"),
        (f"{__name__}:absent", "cannot find the function .*absent"),
        ("no_such_module:function", "cannot find the function 'no_such_module:function'"),
        (f"{__name__}:grey", r"test_control:grey is uint8 of shape \(16, 16\) .* \(16, 16, 3\)"),
        (f"{__name__}:bright", "is float64 of shape"),
        # Not a black condition for every picture.
        ("hed", "pip install 'sana-sprint\\[control\\]'"),
    ],
)
def test_conditions_that_cannot_be_made_are_named(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    values = control_teacher_run(tmp_path / "run", chain)
    values["control"]["condition"] = name
    with pytest.raises(ValueError, match=message):
        make(parse(values))


def test_what_makes_a_condition_is_part_of_its_cache() -> None:
    source = open_source("tests.helpers.training:colored_square")

    def digest(name: str, positions: range = range(3), **fitting: int) -> str:
        return ConditionSource(source, name, **fitting).digest(positions)

    digests = [digest("canny"), digest("softedge"), digest("canny", range(3, 6)), digest("canny", size=32)]
    assert len(set(digests)) == 4
    assert digest("canny") == digests[0]
    before = digest("tests.helpers.training:square_mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.training.square_mask", inverted)
        assert digest("tests.helpers.training:square_mask") != before


def test_latents_by_index_draw_nothing() -> None:
    blocks = [torch.randn(3, 4, 2, 2).bfloat16(), torch.randn(2, 4, 2, 4).bfloat16()]
    cache = LatentCache(blocks, [("a", "b")] * 5)
    state = torch.get_rng_state()
    found = cache.latents(torch.tensor([2, 0, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    assert found.dtype == torch.float32
    assert torch.equal(found, blocks[0][[2, 0, 2]].float())
    assert torch.equal(cache.latents(torch.tensor([4])), blocks[1][1:].float())
    assert torch.equal(cache.batch(torch.tensor([2, 0, 2]))[0], found)
    with pytest.raises(ValueError, match="must have one shape"):
        cache.latents(torch.tensor([2, 3]))
