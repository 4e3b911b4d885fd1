"""LoRA: low-rank additions `W + strength * (alpha / r) * up @ down` to weights (arXiv 2106.09685, section 4.1)."""

from sana_sprint.lora.files import Adapter, AdapterFile, LowRank, parse_adapter, read_adapter
from sana_sprint.lora.merge import Adapters, adapters_of, check_scale, settle

__all__ = [
    "Adapter",
    "AdapterFile",
    "Adapters",
    "LowRank",
    "adapters_of",
    "check_scale",
    "parse_adapter",
    "read_adapter",
    "settle",
]
