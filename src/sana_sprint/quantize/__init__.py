"""Quantisation: presets by name, for each component of a pipeline.

int8          weights in 8 bits per output row, activations rounded to 8 bits per token while computing: faster
int8-weights  weights in 8 bits per output row, dequantised on every call: smaller
fp8           as int8 in float8_e4m3 (Ada, Hopper and later)
int4-weights  weights in 4 bits, evenly spaced, with a scale per 64 inputs
nf4           the same at the levels of normally distributed weights (QLoRA, arXiv 2305.14314, section 3)
"""

from sana_sprint.quantize.formats import PRESETS
from sana_sprint.quantize.models import check_device, make_quantized, quantize_model
from sana_sprint.quantize.parse import parse_request

__all__ = ["PRESETS", "check_device", "make_quantized", "parse_request", "quantize_model"]
