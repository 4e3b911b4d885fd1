"""Quantised components of a pipeline: made in place, and read from and written to folders.

The folder of a quantised component holds codes and scales in its usual weight files, and their preset in
`quantization.json`: {"preset": "int8"}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sana_sprint.lora import settle
from sana_sprint.models.text_encoder import build_text_encoder
from sana_sprint.quantize import PRESETS, check_device, make_quantized, parse_request, quantize_model
from sana_sprint.weights import WeightsError, load_model
from sana_sprint.weights.files import read_json, write_json

QUANTIZATION_FILE = "quantization.json"


# ----- in place -------------------------------------------------------------------------------------------------------


def quantize_components(components: dict[str, Any], request: Any) -> None:
    """Quantise, in place, those of `components` that `request` asks for; see `quantize.parse_request`.

    LoRAs are merged for good first. Everything is checked before anything is changed.

    Raises:
        ValueError: for a bad request, a component that is None, quantised already or on a device that cannot run it.
    """
    modules: dict[str, Any] = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    presets = parse_request(request, components)
    for name, preset in presets.items():
        if name not in modules:
            raise ValueError(f"{name} cannot be quantised: this pipeline has no such weights")
        if (present := quantization_of(modules[name])) is not None:
            raise ValueError(f"{name} is quantised already, as {present}")
        check_device(preset, name, modules[name].device)
    for name, preset in presets.items():
        settle(modules[name])
        quantize_model(modules[name], name, preset)


def quantization_of(module: Any) -> str | None:
    """The preset of a component, "transformers" for one that this library has quantised, None if it is not quantised."""
    preset = getattr(module, "quantization", None)
    return "transformers" if preset is None and getattr(module, "hf_quantizer", None) is not None else preset


def check_move(components: dict[str, nn.Module], device: str | torch.device | None) -> None:
    """Raise ValueError if one of these components is quantised in a way that `device` cannot run."""
    for name, module in components.items():
        if device is not None and (preset := quantization_of(module)) in PRESETS:
            check_device(str(preset), name, torch.device(device))


# ----- folders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _QuantizedClass:
    """A model class whose models are made with unset codes, for `weights.load_model`."""

    cls: Any
    component: str
    preset: str

    @property
    def published_class_name(self) -> str:
        return str(self.cls.published_class_name)

    @property
    def config_class(self) -> Any:
        return self.cls.config_class

    def __call__(self, config: Any, /) -> nn.Module:
        model: nn.Module = self.cls(config)
        make_quantized(model, self.component, self.preset)
        return model


def stored_preset(folder: Path) -> str | None:
    """The preset of the component in `folder`, None if it is not quantised."""
    path = folder / QUANTIZATION_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    if set(fields) != {"preset"} or not isinstance(fields["preset"], str):
        raise WeightsError(f'{path} must be {{"preset": NAME}}, got: {fields}')
    return fields["preset"]


def note_preset(component: Any, folder: Path) -> None:
    """Write `quantization.json`, or remove one of an older model."""
    path = folder / QUANTIZATION_FILE
    if (preset := quantization_of(component)) is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"preset": preset})


def load_quantized(
    cls: Any,
    component: str,
    folder: Path,
    preset: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None,
) -> nn.Module:
    """A quantised component as it was saved; `cls` None is the text encoder.

    Raises:
        ValueError: if the device cannot run it, or the files do not fit.
    """
    try:
        check_device(preset, component, device)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    if cls is not None:
        quantized = _QuantizedClass(cls, component, preset)
        return load_model(quantized, folder, dtype=dtype, device=device, variant=variant)
    return _load_text_encoder(folder, preset, dtype=dtype, device=device, variant=variant)


def _load_text_encoder(
    folder: Path, preset: str, *, dtype: torch.dtype | None, device: torch.device, variant: str | None
) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import Gemma2Config

    config = Gemma2Config.from_pretrained(folder, local_files_only=True)
    stem = "model" if variant is None else f"model.{variant}"  # transformers' names
    files = [*folder.glob(f"{stem}.safetensors"), *sorted(folder.glob(f"{stem}-*.safetensors"))]
    model: Any = build_text_encoder(config, random_weights=False)
    make_quantized(model, "text_encoder", preset)
    try:
        state = {key: tensor for file in files for key, tensor in load_file(file).items()}
        model.load_state_dict(state, strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"cannot load the text encoder in {folder}: {error}") from error
    return model.to(device=device, dtype=dtype).eval()  # type: ignore[no-any-return]
