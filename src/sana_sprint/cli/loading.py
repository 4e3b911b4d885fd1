"""The pipeline that a command's options ask for."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sana_sprint.cli.common import CommandError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
    from sana_sprint.pipelines.text_to_image import SanaSprintPipeline

# The text encoder and the autoencoder do not run in fp16: there only the transformer does.
DTYPES: dict[str, Any] = {
    "auto": None,
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp16": {"transformer": "float16", "default": "bfloat16"},
}
MODEL_HINT = "check --model (or SANA_SPRINT_MODEL); `sana-sprint info MODEL` shows what a folder lacks"


@dataclass(frozen=True)
class ModelOptions:
    """The model and how to run it. `dtype` is a key of `DTYPES`; `device` may be "auto".

    loras: `SOURCE` or `SOURCE:WEIGHT` each. quantize: a preset, or `COMPONENT=PRESET,...`, or "" for none.
    fast: fused kernels and graphs on CUDA, and nothing elsewhere.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    vae_tiling: bool = False
    vae_slicing: bool = False
    loras: tuple[str, ...] = ()
    quantize: str = ""
    fast: bool = False

    def notes(self) -> dict[str, Any]:
        """Settings to be kept with a picture, besides the model's name."""
        return {
            **({"loras": list(self.loras)} if self.loras else {}),
            **({"quantize": self.quantize} if self.quantize else {}),
        }


def load_pipeline(options: ModelOptions) -> SanaSprintPipeline:
    """A pipeline from text that is ready to be called.

    Raises:
        UsageError: for a device that this machine lacks.
        CommandError: if the model cannot be found or loaded.
    """
    pipeline: SanaSprintPipeline = _load("text_to_image", "SanaSprintPipeline", options)
    return pipeline


def load_control_pipeline(options: ModelOptions, controlnet: Path | None) -> SanaSprintControlNetPipeline:
    """As `load_pipeline`, for a pipeline that follows pictures; `controlnet` is a folder in place of the model's own."""
    parts = {} if controlnet is None else {"controlnet": controlnet}
    pipeline: SanaSprintControlNetPipeline = _load(
        "controlnet", "SanaSprintControlNetPipeline", options, **parts
    )
    return pipeline


def load_pair(
    options: ModelOptions, controlnet: Path | None = None
) -> tuple[SanaSprintPipeline, SanaSprintControlNetPipeline | None]:
    """A pipeline from text, and one of the same models that follows pictures if there is a controlnet or one is given.

    Errors are those of `load_pipeline`.
    """
    if controlnet is None and not _has_controlnet(options.model):
        return load_pipeline(options), None
    control = load_control_pipeline(options, controlnet)
    text_class = import_module("sana_sprint.pipelines.text_to_image").SanaSprintPipeline
    text: SanaSprintPipeline = text_class.from_pipe(control)
    text.set_progress_bar_config(disable=True)
    return text, control


def _has_controlnet(model: str) -> bool:
    from sana_sprint.weights import CONFIG_NAME, resolve_folder

    try:
        return (resolve_folder(model) / "controlnet" / CONFIG_NAME).is_file()
    except ValueError as error:
        raise CommandError(str(error), hint=MODEL_HINT) from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Turns garbage collection off inside, and exempts from it everything made by then.

    Libraries and models are a million objects that stay; searching them again and again takes a sixth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@uncollected()
def _load(module: str, name: str, options: ModelOptions, **parts: Any) -> Any:
    """A ready pipeline of class `name` in `pipelines.module`; `parts` are components to use instead of the model's.

    Raises:
        UsageError: for a device that this machine lacks.
        CommandError: if the model cannot be found or loaded.
    """
    device = choose_device(options.device)
    quieten()
    pipeline_class = getattr(import_module(f"sana_sprint.pipelines.{module}"), name)
    try:
        pipeline = pipeline_class.from_pretrained(
            options.model, torch_dtype=DTYPES[options.dtype], device_map=device, **parts
        )
    except ValueError as error:
        hint = "--dtype bf16 or --dtype fp32 may help" if "float16" in str(error) else MODEL_HINT
        if "lacks controlnet" in str(error):
            hint = "choose a --model that has a controlnet, or name a folder with one by --controlnet"
        raise CommandError(str(error), hint=hint) from error
    _adapt(pipeline, options)
    pipeline.set_progress_bar_config(disable=True)  # the commands have their own
    if options.vae_tiling:
        pipeline.enable_vae_tiling()
    if options.vae_slicing:
        pipeline.enable_vae_slicing()
    if options.fast:
        accelerate(pipeline, device)
    return pipeline


def accelerate(pipeline: Any, device: str) -> None:
    """Turn on what CUDA offers, as far as it is installed."""
    if device.startswith("cuda"):
        with suppress(ValueError):  # without Triton
            pipeline.enable_fused_kernels()
        pipeline.enable_cuda_graphs()


def _adapt(pipeline: Any, options: ModelOptions) -> None:
    """Merge the LoRAs, then quantise."""
    weights = {}
    try:
        for number, text in enumerate(options.loras):
            source, weight = _weighted(text)
            name = f"lora{number}"
            pipeline.load_lora_weights(source, adapter_name=name)
            weights[name] = weight
        if weights:
            pipeline.set_adapters(list(weights), list(weights.values()))
    except ValueError as error:
        raise CommandError(
            str(error), hint="--lora takes a safetensors file, a folder or a Hub id"
        ) from error
    try:
        pipeline.quantize(_presets(options.quantize))
    except ValueError as error:
        hint = "--quantize takes a preset, or COMPONENT=PRESET,... such as transformer=int8,vae=int8"
        raise CommandError(str(error), hint=hint) from error


def _weighted(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> its two parts; 1 where there is no number."""
    source, colon, number = text.rpartition(":")
    try:
        return (source, float(number)) if colon else (text, 1.0)
    except ValueError:  # a colon of the path itself
        return text, 1.0


def _presets(text: str) -> Any:
    """As `pipeline.quantize` takes it."""
    if "=" not in text:
        return text or None
    return dict(part.strip().partition("=")[::2] for part in text.split(","))


def choose_device(wanted: str) -> str:
    """The device to use: the one that is wanted, or for "auto" the machine's accelerator, else the CPU.

    Raises:
        UsageError: for a device that is unknown or not there.
    """
    import torch

    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    there = [name for name, count in counts.items() if count]
    if wanted == "auto":
        return next((name for name in ("cuda", "mps") if counts[name]), "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", wanted)
    if match is None or int(match[2] or 0) >= counts[match[1]]:
        raise UsageError(f"--device is not on this machine: {wanted}", hint=f"use auto or {', '.join(there)}")
    return wanted


def quieten() -> None:
    """Silence libraries' progress bars and remarks; commands report what users need to know."""
    talk: Any = import_module("transformers.utils.logging")  # its functions have no annotations
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    logging.getLogger("sana_sprint").addHandler(logging.NullHandler())
