"""LoRA methods of the pipelines, under their published names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sana_sprint.lora import Adapters, adapters_of, parse_adapter, read_adapter, settle
from sana_sprint.models.transformer import SanaTransformer2DModel


class LoraMethods:
    """Loads LoRAs into the transformer. None of these methods may run while the pipeline is drawing."""

    transformer: SanaTransformer2DModel | None

    def load_lora_weights(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        weight_name: str | None = None,
        adapter_name: str | None = None,
        **hub: Any,
    ) -> None:
        """Add a LoRA to the transformer and use it at weight 1.

        Args:
            source: a safetensors file, a folder, a Hugging Face id, or tensors by their key; see `sana_sprint.lora` for
                the keys.
            weight_name: the file in a folder or repository, if it holds several.
            adapter_name: for `set_adapters`; "default_0" and so on if left out.
            hub: `revision`, `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if it is not found, does not fit the transformer to the last key, or the transformer is quantised
                (merging comes first: load, then `quantize`).
        """
        transformer = self._transformer()
        if getattr(transformer, "quantization", None) is not None:
            raise ValueError(
                f"the transformer is quantised ({transformer.quantization}): load the LoRA into the unquantised "
                "model, then call quantize"
            )
        file = read_adapter(source, weight_name=weight_name, **hub)
        adapter = parse_adapter(file, transformer)
        Adapters.inside(transformer).add(adapter_name, adapter)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use exactly these LoRAs, each at its weight (one number for all; 1 if left out)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        values = [float(weights)] * len(names) if isinstance(weights, int | float) else list(weights)
        if len(values) != len(names):
            raise ValueError(f"there must be one weight per LoRA, {len(names)} here; got: {len(values)}")
        self._adapters().use(dict(zip(names, values, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs in use."""
        adapters = self._find_adapters()
        return [] if adapters is None else list(adapters.weights)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Fix the LoRAs in use, times `lora_scale`. `unload_lora_weights` then keeps the fused weights."""
        self._adapters().fuse(lora_scale)

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: LoRAs can be changed again."""
        self._adapters().unfuse()

    def unload_lora_weights(self) -> None:
        """Forget the LoRAs and have the original weights back, bit for bit; fused ones stay, as published."""
        adapters = self._find_adapters()
        if adapters is not None:
            if not adapters.fused:
                adapters.remove()
            settle(self._transformer())

    def _transformer(self) -> SanaTransformer2DModel:
        if self.transformer is None:
            raise ValueError("this pipeline was made without transformer, which a LoRA needs")
        return self.transformer

    def _find_adapters(self) -> Adapters | None:
        return adapters_of(self._transformer())

    def _adapters(self) -> Adapters:
        adapters = self._find_adapters()
        if adapters is None:
            raise ValueError("no LoRA is loaded: call load_lora_weights first")
        return adapters

    def _transformer_at(self, attention_kwargs: Mapping[str, Any] | None) -> SanaTransformer2DModel:
        """The transformer for one call, whose `attention_kwargs` may hold the LoRAs' "scale"."""
        if unknown := sorted(set(attention_kwargs or {}) - {"scale"}):
            raise ValueError(f"attention_kwargs may hold 'scale' only, got: {', '.join(unknown)}")
        if not attention_kwargs:
            return self._transformer()
        adapters = self._find_adapters()
        if adapters is None:
            raise ValueError("attention_kwargs['scale'] is the strength of a LoRA, and no LoRA is loaded")
        scaled = adapters.at(attention_kwargs["scale"])
        assert isinstance(scaled, SanaTransformer2DModel)
        return scaled
