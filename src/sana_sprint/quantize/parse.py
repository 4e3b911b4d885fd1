"""Parses a user's quantisation request into a preset per component.

Config objects of transformers and diffusers are recognised by their fields, so neither library is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sana_sprint.quantize.formats import PRESETS

# Components that a single setting applies to; the decoder, whose errors are visible at once, must be named.
BY_DEFAULT = ("transformer", "text_encoder")
TORCHAO = {
    "Int8WeightOnlyConfig": "int8-weights",
    "Int8DynamicActivationInt8WeightConfig": "int8",
    "Int4WeightOnlyConfig": "int4-weights",
    "Float8DynamicActivationFloat8WeightConfig": "fp8",
    "int8_weight_only": "int8-weights",
    "int8_dynamic_activation_int8_weight": "int8",
    "int4_weight_only": "int4-weights",
    "float8_dynamic_activation_float8_weight": "fp8",
}


def parse_request(request: Any, components: Iterable[str]) -> dict[str, str]:
    """The preset of each component in a request.

    Args:
        request: None; a preset's name or a config object, for the transformer and the text encoder; a mapping of
            component to either (None leaves it as it is); or a PipelineQuantizationConfig. Config objects are
            BitsAndBytesConfig and TorchAoConfig, of transformers or diffusers: only their format is used, the arithmetic
            is this package's. bitsandbytes' 8 bits become "int8-weights", which rounds no activations.
        components: those the pipeline has.

    Raises:
        ValueError: for anything else, naming what is allowed.
    """
    components = list(components)
    if request is None:
        return {}
    if isinstance(request, Mapping):
        wanted = dict(request)
    elif getattr(request, "quant_mapping", None) is not None:
        wanted = dict(request.quant_mapping)
    elif getattr(request, "quant_backend", None) is not None:
        preset = _of_backend(request.quant_backend, request.quant_kwargs or {})
        wanted = dict.fromkeys(request.components_to_quantize or BY_DEFAULT, preset)
    else:
        wanted = dict.fromkeys((name for name in BY_DEFAULT if name in components), request)
    if unknown := sorted(set(wanted) - set(components)):
        raise ValueError(
            f"quantization_config names unknown components: {', '.join(unknown)}; known: {', '.join(components)}"
        )
    return {name: _preset(value) for name, value in wanted.items() if value is not None}


def _preset(value: Any) -> str:
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"no such quantisation: {value!r}; allowed: {', '.join(PRESETS)}")
        return value
    kind = type(value).__name__
    skipped = getattr(value, "llm_int8_skip_modules", None) or getattr(value, "modules_to_not_convert", None)
    if skipped:
        raise ValueError(
            f"{kind} excludes layers ({', '.join(skipped)}); here the preset decides which layers are quantised"
        )
    if getattr(value, "load_in_8bit", False):
        return "int8-weights"
    if getattr(value, "load_in_4bit", False):
        return _four_bits(getattr(value, "bnb_4bit_quant_type", None))
    if getattr(value, "quant_type", None) is not None:
        return _torchao(value.quant_type)
    raise ValueError(
        f"not a quantisation: {kind}; allowed: {', '.join(PRESETS)}, BitsAndBytesConfig, TorchAoConfig"
    )


def _of_backend(backend: str, settings: Mapping[str, Any]) -> str:
    if backend == "bitsandbytes_8bit":
        return "int8-weights"
    if backend == "bitsandbytes_4bit":
        return _four_bits(settings.get("bnb_4bit_quant_type"))
    if backend == "torchao":
        return _torchao(settings.get("quant_type"))
    raise ValueError(
        f"no such quant_backend here: {backend!r}; allowed: bitsandbytes_8bit, bitsandbytes_4bit, torchao"
    )


def _four_bits(kind: str | None) -> str:
    if kind != "nf4":  # bitsandbytes' own default is fp4
        raise ValueError(f"bnb_4bit_quant_type must be 'nf4', got: {kind!r}")
    return "nf4"


def _torchao(kind: Any) -> str:
    name = kind if isinstance(kind, str) else type(kind).__name__
    if name not in TORCHAO:
        raise ValueError(f"no such torchao quant_type here: {name}; allowed: {', '.join(TORCHAO)}")
    return TORCHAO[name]
