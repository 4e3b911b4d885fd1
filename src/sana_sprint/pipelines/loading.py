"""The components of a pipeline folder, read and written one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.quantized import load_quantized, note_preset, stored_preset
from sana_sprint.precision import component_dtypes
from sana_sprint.scheduler import SCMScheduler
from sana_sprint.weights import (
    CONFIG_NAME,
    ModelIndex,
    WeightsError,
    available_variants,
    load_model,
    read_model_index,
    save_model,
    write_model_index,
)

# Subfolders with weights, in the order in which they are loaded: the largest comes last, after errors have shown.
MODEL_CLASSES: dict[str, Any] = {
    "vae": AutoencoderDC,
    "controlnet": SanaControlNetModel,
    "transformer": SanaTransformer2DModel,
}
MODULES = (*MODEL_CLASSES, "text_encoder")
SPREADS = ("auto", "balanced")

DeviceMap = str | torch.device | Mapping[str, str | torch.device]
DtypeRequest = torch.dtype | str | Mapping[str, torch.dtype | str | None]


# ----- reading --------------------------------------------------------------------------------------------------------


def load_components(
    folder: Path,
    names: Iterable[str],
    *,
    given: Mapping[str, Any],
    dtype: DtypeRequest | None = None,
    device_map: DeviceMap | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Component name -> object, for each of `names`.

    Args:
        folder: with model_index.json and a subfolder per component. A controlnet's subfolder counts without being listed
            there: other pipelines do without it.
        names: the pipeline's components.
        given: components that are taken from here: the object, or the path of a folder of it or with it; None means
            the pipeline does without it.
        dtype: see `precision.component_dtypes`. None keeps the stored dtypes.
        device_map: see `plan_devices`.
        variant: read these weight files; a component that lacks them is read from its plain files.

    Raises:
        ValueError: (mostly as `WeightsError`) naming the folder, file, component, dtype or device that is wrong.
    """
    names = list(names)
    modules = [name for name in MODULES if name in names]
    dtypes, devices = component_dtypes(dtype, modules), plan_devices(device_map, modules)
    listed = dict(read_model_index(folder).components)
    if (folder / "controlnet" / CONFIG_NAME).is_file():
        listed.setdefault("controlnet", ("diffusers", SanaControlNetModel.published_class_name))
    wanted = [name for name in names if name not in given]
    if missing := [name for name in wanted if name not in listed]:
        raise WeightsError(
            f"model_index.json in {folder} lacks {', '.join(missing)}; pass them to from_pretrained, or None to do without"
        )
    present = [name for name in wanted if listed[name] is not None]
    variants = _choose_variants(folder, [name for name in modules if name in present], variant)
    readers: dict[str, Callable[[Path], Any]] = {
        "scheduler": SCMScheduler.from_pretrained,
        "tokenizer": load_tokenizer,
    }
    for name in modules:
        readers[name] = _module_reader(name, dtypes[name], devices[name], variants.get(name))
    places = {name: folder / name for name in present}
    places |= {
        name: _place(value, name) for name, value in given.items() if isinstance(value, str | os.PathLike)
    }
    loaded = {name: read(places[name]) for name, read in readers.items() if name in places}
    return {name: loaded[name] if name in loaded else given.get(name) for name in names}


def _place(given: str | os.PathLike[str], name: str) -> Path:
    """A component's folder, which is given itself or as one that has the component in it."""
    folder = Path(given)
    return folder / name if (folder / name).is_dir() else folder


def _module_reader(
    name: str, dtype: torch.dtype | None, device: torch.device, variant: str | None
) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        if (preset := stored_preset(folder)) is not None:
            cls = MODEL_CLASSES.get(name)
            return load_quantized(cls, name, folder, preset, dtype=dtype, device=device, variant=variant)
        if name == "text_encoder":
            return load_text_encoder(folder, dtype=dtype, device=device, variant=variant)
        return load_model(MODEL_CLASSES[name], folder, dtype=dtype, device=device, variant=variant)

    return read


def _choose_variants(folder: Path, names: Iterable[str], variant: str | None) -> dict[str, str | None]:
    """The variant to read for each component: published repositories offer one for some components only."""
    if variant is None:
        return {}
    there = {name: available_variants(folder / name) for name in names}
    if there and not any(variant in found for found in there.values()):
        offers = sorted({str(offer) for found in there.values() for offer in found if offer})
        raise WeightsError(
            f"no component in {folder} has the variant {variant!r}; variants there: {', '.join(offers) or 'none'}"
        )
    return {name: variant if variant in found else None for name, found in there.items()}


def plan_devices(device_map: DeviceMap | None, names: Iterable[str]) -> dict[str, torch.device]:
    """The device of each component.

    None is the CPU; a device holds all; a mapping gives each component (or "" for the others) its device. "auto" and
    "balanced" take the machine's accelerators: the text encoder goes to the last one and the rest to the first, which
    is the same one if there is but one, and the CPU if there is none.

    Raises:
        ValueError: for an unknown component or something that is no device.
    """
    names = list(names)
    if device_map is None:
        return dict.fromkeys(names, torch.device("cpu"))
    if isinstance(device_map, Mapping):
        if unknown := sorted(set(device_map) - {*names, ""}):
            raise ValueError(
                f"device_map names unknown components: {', '.join(unknown)}; known: {', '.join(names)}"
            )
        return {name: _device(device_map.get(name, device_map.get("", "cpu"))) for name in names}
    if device_map not in SPREADS:
        return dict.fromkeys(names, _device(device_map))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return dict.fromkeys(names, torch.device("cpu"))
    last = torch.accelerator.device_count() - 1
    return {name: torch.device(accelerator.type, last if name == "text_encoder" else 0) for name in names}


def _device(value: str | torch.device) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"not a device: {value!r} ({reason}); allowed: {', '.join(SPREADS)}, 'cpu', 'cuda', ..."
        ) from None


# ----- writing --------------------------------------------------------------------------------------------------------


def save_components(
    components: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    class_name: str,
    variant: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a pipeline folder that diffusers reads too, unless a component is quantised; None is noted as absent.

    model_index.json is written last, so that a folder whose writing failed is not taken for a model.

    Raises:
        ValueError: if a component cannot be written.
    """
    folder = Path(folder)
    for name, component in components.items():
        target = folder / name
        if component is None:
            continue
        if name in MODEL_CLASSES:
            save_model(component, target, variant=variant, max_shard_size=max_shard_size)
        elif name == "text_encoder":
            component.save_pretrained(target, variant=variant, max_shard_size=max_shard_size)
        else:
            component.save_pretrained(target)
        note_preset(component, target)
    classes = {name: _published_class(name, component) for name, component in components.items()}
    write_model_index(folder, ModelIndex(class_name=class_name, components=classes))


def _published_class(name: str, component: Any) -> tuple[str, str] | None:
    """(library, class name) under which diffusers finds the component."""
    if component is None:
        return None
    library = "transformers" if name in ("tokenizer", "text_encoder") else "diffusers"
    return library, getattr(component, "published_class_name", type(component).__name__)
