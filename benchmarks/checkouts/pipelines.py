"""Items on whole pipelines: the embedded model, control, quantisation, LoRA, and prompts."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from checkouts import fixtures
from checkouts.models import noise, quiet
from checkouts.record import Record, item
from sana_sprint import SanaSprintControlNetPipeline, SanaSprintPipeline

PROMPTS = [
    "a red heart",
    "two apples on a blue background",
    "a tiny yellow star left of a green tree, at night",
]


def emoji(**how: Any) -> Any:
    return quiet(SanaSprintPipeline.from_pretrained("emoji", **how))


def facts(made: Any) -> dict[str, Any]:
    """The numbers that an output reports."""
    names = (
        "seeds",
        "times",
        "guidance",
        "height",
        "width",
        "model_height",
        "model_width",
        "dtype",
        "lost_tokens",
    )
    return {name: getattr(made, name) for name in names}


# ----- text to image --------------------------------------------------------------------------------------------------


@item("embedded/bf16", None)
@item("embedded/fp32", torch.float32)
def embedded(record: Record, dtype: torch.dtype | None) -> None:
    pipe = emoji(torch_dtype=dtype)
    for steps in (1, 2, 3, 4):
        made = pipe(PROMPTS, num_inference_steps=steps, seed=11, output_type="np")
        record.note(f"{steps} steps", made.images)
        record.note(f"{steps} steps: facts", facts(made))
    for seed in (0, 5, 2**31):
        record.note(f"seed {seed}", pipe(PROMPTS[0], seed=seed).images)


@item("embedded/arguments")
def embedded_arguments(record: Record) -> None:
    """Each argument of a call away from its default."""
    pipe = emoji()
    cases: dict[str, dict[str, Any]] = {
        "several a prompt": {"num_images_per_prompt": 2, "guidance_scale": [4.0, 5.0, 4.5]},
        "times": {"timesteps": [1.55, 1.1, 0.6]},
        "first and second": {"max_timesteps": 1.5, "intermediate_timesteps": 1.0},
        "binned": {"height": 96, "width": 200},
        "as it is": {"height": 160, "width": 96, "use_resolution_binning": False},
        "cut": {"max_sequence_length": 6},
        "no instruction": {"complex_human_instruction": None},
        "instruction": {"complex_human_instruction": ["Draw it.", "User: "]},
        "seeds": {"seed": [3, 1, 2]},
        "latents": {"latents": noise(3, 16, 8, 8), "output_type": "latent"},
        "latent": {"output_type": "latent"},
        "tensor": {"output_type": "pt"},
        "tuple": {"return_dict": False, "output_type": "pt"},
    }
    for name, arguments in cases.items():
        made = pipe(PROMPTS, **{"seed": 1, **arguments})
        record.note(name, made[0])
        if not isinstance(made, tuple):
            record.note(f"{name}: facts", facts(made))
    generator = torch.Generator().manual_seed(8)
    record.note("generator", pipe(PROMPTS, generator=generator, output_type="latent").images)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    record.note("generators", pipe(PROMPTS, generator=generators, output_type="latent").images)


@item("embedded/memory")
def embedded_memory(record: Record) -> None:
    """Large pictures, tiles, slices and components given back."""
    pipe = emoji()
    large = {"height": 768, "width": 640, "use_resolution_binning": False, "seed": 4, "output_type": "pt"}
    record.note("large", pipe(PROMPTS[1], num_inference_steps=1, **large).images)
    pipe.enable_vae_tiling(tile_sample_min_height=256, tile_sample_min_width=256)
    record.note("tiled", pipe(PROMPTS[1], num_inference_steps=1, **large).images)
    pipe.disable_vae_tiling()
    pipe.enable_vae_slicing()
    pipe.enable_disk_offload()
    record.note("sliced, given back", pipe(PROMPTS, seed=1, output_type="pt").images)
    record.note("once more", pipe(PROMPTS, seed=1, output_type="pt").images)


@item("embedded/callback")
def embedded_callback(record: Record) -> None:
    """Tensors that a callback receives, and their changes."""
    pipe = emoji()

    def change(_: Any, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        record.note(f"step {step}", {**tensors, "t": torch.tensor(float(t), dtype=torch.float64)})
        return {"latents": 0.9 * tensors["latents"], "prompt_embeds": 1.1 * tensors["prompt_embeds"]}

    names = ["latents", "prompt_embeds"]
    made = pipe(
        PROMPTS,
        num_inference_steps=3,
        seed=2,
        output_type="pt",
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=names,
    )
    record.note("made", made.images)


@item("embedded/folder")
def embedded_folder(record: Record) -> None:
    """Files that are written, and pictures of what was written."""
    pipe = emoji()
    pipe.save_pretrained("saved", max_shard_size="4MB")
    record.note_folder("saved", Path("saved"))
    again = quiet(SanaSprintPipeline.from_pretrained("saved"))
    record.note("again", again(PROMPTS, seed=1, output_type="pt").images)
    apart = quiet(SanaSprintPipeline(**pipe.components))
    record.note("from components", apart(PROMPTS, seed=1, output_type="pt").images)
    record.note("cast", pipe.to(torch.float32)(PROMPTS, seed=1, output_type="pt").images)


# ----- control --------------------------------------------------------------------------------------------------------


@item("control/embedded")
def control(record: Record) -> None:
    pipe = quiet(SanaSprintControlNetPipeline.from_pretrained("emoji"))
    sketch, photo = (str(fixtures.FOLDER / "pictures" / name) for name in ("sketch.png", "photo.png"))
    cases: dict[str, dict[str, Any]] = {
        "scribble, 1 step": {"image": sketch, "kind": "scribble", "num_inference_steps": 1},
        "scribble, 2 steps": {"image": sketch, "kind": "scribble"},
        "scribble, 4 steps": {"image": sketch, "kind": "scribble", "num_inference_steps": 4},
        "canny": {"image": photo, "kind": "canny"},
        "one each": {"image": [sketch, photo, sketch], "kind": "canny"},
        "weak": {"image": sketch, "kind": "scribble", "controlnet_conditioning_scale": 0.4},
        "not at all": {"image": sketch, "kind": "scribble", "controlnet_conditioning_scale": 0.0},
        "early": {"image": sketch, "kind": "scribble", "control_guidance_end": 0.5},
        "late": {
            "image": sketch,
            "kind": "scribble",
            "control_guidance_start": 0.4,
            "num_inference_steps": 4,
        },
        "several a prompt": {"image": sketch, "kind": "scribble", "num_images_per_prompt": 2},
        "another size": {"image": photo, "kind": "canny", "height": 100, "width": 180},
    }
    for name, arguments in cases.items():
        made = pipe(PROMPTS, seed=6, output_type="pt", **arguments)
        record.note(name, made.images)
        record.note(f"{name}: seen", list(made.conditions))


@item("control/diffusers", "diffusers")
@item("control/official", "official")
def control_random(record: Record, topology: str) -> None:
    pipe = quiet(SanaSprintControlNetPipeline.from_pretrained(fixtures.FOLDER / "controlled" / topology))
    picture = fixtures.FOLDER / "pictures" / "photo.png"

    def replace(_: Any, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": 1.1 * tensors["prompt_embeds"]}

    for steps in (1, 2, 3):
        made = pipe(
            PROMPTS, num_inference_steps=steps, image=picture, kind="softedge", seed=6, output_type="pt"
        )
        record.note(f"{steps} steps", made.images)
    made = pipe(
        PROMPTS,
        image=picture,
        seed=6,
        output_type="latent",
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    record.note("other prompts on the way", made.images)
    text = SanaSprintPipeline.from_pipe(pipe)
    record.note("by text alone", quiet(text)(PROMPTS, seed=6, output_type="pt").images)


_ANNOTATORS = {
    "hed": "HEDdetector",
    "depth": "MidasDetector",
    "lineart": "LineartDetector",
    "mlsd": "MLSDdetector",
    "normal": "NormalBaeDetector",
    "openpose": "OpenposeDetector",
    "pidi": "PidiNetDetector",
}


def _stand_in_annotators() -> None:
    """A module in the place of controlnet-aux whose detectors need no weights."""
    module = types.ModuleType("controlnet_aux")
    for name in _ANNOTATORS.values():
        detector = types.SimpleNamespace(
            from_pretrained=lambda *_: lambda picture: picture.convert("RGB").filter(ImageFilter.FIND_EDGES)
        )
        setattr(module, name, detector)
    sys.modules["controlnet_aux"] = module


@item("control/kinds")
def control_kinds(record: Record) -> None:
    """Conditions of every kind from one picture."""
    _stand_in_annotators()
    pipe = quiet(SanaSprintControlNetPipeline.from_pretrained("emoji"))
    settings: list[tuple[str | None, int | None]] = [(None, None), ("scribble", None), ("scribble", 1)]
    settings += [("scribble", 4), ("canny", None), ("softedge", None)]
    for picture in sorted((fixtures.FOLDER / "pictures").iterdir()):
        kinds = [*settings, *((kind, None) for kind in _ANNOTATORS)] if picture.stem == "photo" else settings
        for kind, thickness in kinds:
            for size in ({}, {"height": 200, "width": 320, "use_resolution_binning": False}):
                name = f"{picture.name} {kind} {thickness} {len(size)}"
                try:
                    made = pipe(
                        "x",
                        num_inference_steps=1,
                        image=Image.open(picture),
                        kind=kind,
                        thickness=thickness,
                        output_type="latent",
                        seed=0,
                        **size,
                    )
                    record.note(name, list(made.conditions))
                except ValueError as error:
                    record.note(name, type(error).__name__)


# ----- quantisation and LoRA ------------------------------------------------------------------------------------------


@item("quantize/int8", "int8")
@item("quantize/int8-weights", "int8-weights")
@item("quantize/int4-weights", "int4-weights")
@item("quantize/nf4", "nf4")
@item("quantize/fp8", "fp8")
def quantized(record: Record, preset: str) -> None:
    """Pictures, the folder written, and pictures of that folder."""
    pipe = quiet(SanaSprintControlNetPipeline.from_pretrained("emoji"))
    try:
        pipe.quantize(dict.fromkeys(("transformer", "text_encoder", "controlnet"), preset))
    except ValueError as error:  # fp8 has no kernels on a CPU
        record.note("refused", type(error).__name__)
        return
    image = fixtures.FOLDER / "pictures" / "sketch.png"
    record.note("control", pipe(PROMPTS, image=image, kind="scribble", seed=3, output_type="pt").images)
    text = quiet(SanaSprintPipeline.from_pipe(pipe))
    record.note("text", text(PROMPTS, seed=3, output_type="pt").images)
    folder = Path(f"quantized-{preset}")
    text.save_pretrained(folder)
    record.note_folder("folder", folder)
    again = quiet(SanaSprintPipeline.from_pretrained(folder))
    record.note("read", again(PROMPTS, seed=3, output_type="pt").images)
    shutil.rmtree(folder)


@item("lora")
def lora(record: Record) -> None:
    pipe = emoji()

    def draw(name: str, **more: Any) -> None:
        record.note(name, pipe(PROMPTS, seed=2, output_type="pt", **more).images)

    pipe.load_lora_weights(fixtures.FOLDER / "peft.safetensors", adapter_name="one")
    draw("one")
    draw("scaled", attention_kwargs={"scale": 0.5})
    pipe.load_lora_weights(fixtures.FOLDER / "kohya.safetensors", adapter_name="two")
    draw("both")
    pipe.set_adapters(["two", "one"], [0.3, -0.7])
    draw("weighted")
    record.note("active", pipe.get_active_adapters())
    pipe.fuse_lora(0.8)
    draw("fused")
    pipe.unfuse_lora()
    draw("unfused")
    pipe.unload_lora_weights()
    draw("none")
    pipe.load_lora_weights(fixtures.FOLDER / "peft.safetensors")
    pipe.quantize("int8-weights")
    draw("merged and quantised")


# ----- prompts --------------------------------------------------------------------------------------------------------


@item("prompts")
def prompts(record: Record) -> None:
    pipe = emoji()
    texts = [*PROMPTS, "", "  A Cat\nand MORE ", "very long " * 60]
    instructions: dict[str, Any] = {"none": None, "two lines": ["Draw it.", "User: "]}
    for name, lines in instructions.items():
        for _ in range(2):  # the second time from what was kept
            made = pipe.prompt_encoder.encode(texts, complex_human_instruction=lines, max_sequence_length=40)
            record.note(f"instruction {name}", [made.embeds, made.mask])
    encoder = type(pipe.prompt_encoder)(pipe.tokenizer, pipe.text_encoder)  # with its cache
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            made = encoder.encode(texts, complex_human_instruction=["Draw it.", "User: "])
            record.note(f"gradients {grad}", [made.embeds, made.mask])
            record.note(f"gradients {grad}: counts", [made.truncated, made.num_tokens, made.lost_tokens])
    record.note("repeated", pipe.prompt_encoder.encode(["a star"]).repeat(3).embeds)
