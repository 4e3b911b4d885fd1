"""LoRA files: their keys, shapes and settings, read strictly. A key that is not understood, names no layer or has another
shape is an error.

Keys, where PATH is a layer's name in the transformer: `transformer.PATH.lora_A.weight` and `.lora_B.weight` (diffusers,
peft), `.lora.down.weight` and `.lora.up.weight` (older diffusers), `lora_transformer_PATH_WITH_UNDERSCORES.lora_down.weight`
and `.lora_up.weight` (kohya). Alpha is a key `.alpha`, or in the file's metadata, or in peft's adapter_config.json; without
any it is the rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_sprint.weights import download, first_few, is_hub_id, open_safetensors

METADATA_KEY = "lora_adapter_metadata"  # diffusers' metadata key for the adapter's settings
PEFT_CONFIG = "adapter_config.json"
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_transformer_", "lora_unet_")
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:(?:(?P<down>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(?:\.default)?\.weight"
    r"|(?P<alpha>alpha))"
)


# ----- one adapter ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRank:
    """The addition to one layer, `scale * up @ down`: down (r, inputs), up (outputs, r)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, device: torch.device) -> Tensor:
        """(outputs, inputs) in fp32 on `device`."""
        return self.scale * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))


Adapter = dict[str, LowRank]  # by the layer's name in the model


@dataclass(frozen=True)
class AdapterFile:
    """Tensors by key, and the settings of the file (`lora_alpha`, `alpha_pattern`, `use_rslora`)."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


def parse_adapter(file: AdapterFile, model: nn.Module) -> Adapter:
    """The additions of a LoRA file to the layers of `model`, by layer name.

    Raises:
        ValueError: if the file is empty, has keys that are not LoRA's, names layers the model lacks, lacks the other
            half of a layer, or holds other shapes than the model's.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name
    }
    by_spelling = {spelling: name for name in layers for spelling in (name, name.replace(".", "_"))}
    halves: dict[str, dict[str, Tensor]] = {}
    strange, unknown = [], []
    for key, tensor in file.tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        elif (name := by_spelling.get(_without_prefix(match["layer"]))) is None:
            unknown.append(key)
        else:
            halves.setdefault(name, {})["alpha" if match["alpha"] else "down" if match["down"] else "up"] = (
                tensor
            )
    if strange:
        raise ValueError(f"not keys of a LoRA in a supported format: {first_few(strange)}")
    if unknown:
        raise ValueError(f"the LoRA is for layers that this model lacks: {first_few(unknown)}")
    if not halves:
        raise ValueError("the LoRA is empty: nothing in it matches this model")
    return {name: _low_rank(name, parts, layers[name], file.settings) for name, parts in halves.items()}


def _without_prefix(layer: str) -> str:
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer


def _low_rank(
    name: str, parts: Mapping[str, Tensor], layer: nn.Module, settings: Mapping[str, Any]
) -> LowRank:
    if missing := {"down", "up"} - set(parts):
        raise ValueError(f"the LoRA of {name} has no {' and no '.join(sorted(missing))} matrix")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    outputs, inputs = weight.flatten(1).shape
    rank = down.shape[0]
    if down.shape[1] != inputs or up.shape != (outputs, rank):
        raise ValueError(
            f"the LoRA of {name} has shapes {tuple(parts['down'].shape)} and {tuple(parts['up'].shape)}; "
            f"the layer's weight {tuple(weight.shape)} needs (rank, {inputs}) and ({outputs}, rank)"
        )
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(name, rank, settings)
    return LowRank(down, up, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _alpha(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):  # peft's rule: any end of the name
            return float(alpha)
    return float(settings.get("lora_alpha", rank))


# ----- reading --------------------------------------------------------------------------------------------------------


def read_adapter(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> AdapterFile:
    """A safetensors file, a folder with one, a Hugging Face id `owner/name`, or the tensors themselves.

    Args:
        source: as above.
        weight_name: the file's name in a folder or repository; otherwise it has a usual name or is the only one.
        revision, cache_dir, token, local_files_only: huggingface_hub's.

    Raises:
        ValueError: if nothing is found, more than one file might be meant, or the file cannot be read.
    """
    if isinstance(source, Mapping):
        return AdapterFile(source)
    path = Path(source).expanduser()
    if not path.exists() and isinstance(source, str) and is_hub_id(source):
        path = download(
            source,
            [weight_name or "*.safetensors", PEFT_CONFIG],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    file = _choose_file(path, weight_name)
    tensors, metadata = _read(file)
    settings = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else {}
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    if not settings and (config := file.with_name(PEFT_CONFIG)).is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise ValueError(
            f"{file} is a DoRA, which also changes the norms of the weights; only LoRA is supported"
        )
    return AdapterFile(tensors, settings)


def _choose_file(path: Path, weight_name: str | None) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"no such LoRA: {str(path)!r}; allowed: a safetensors file, a folder, a Hub id")
    names = sorted(file.name for file in path.glob("*.safetensors"))
    wanted = [weight_name] if weight_name else list(FILE_NAMES)
    found = [name for name in wanted if (path / name).is_file()] or ([] if weight_name else names)
    if len(found) != 1:
        raise ValueError(
            f"{path} does not hold {weight_name or 'exactly one LoRA'}: its safetensors files are {first_few(names) or 'none'}; "
            "choose one by weight_name"
        )
    return path / found[0]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with open_safetensors(file) as reader:
        tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118  (not a mapping)
        return tensors, reader.metadata() or {}
