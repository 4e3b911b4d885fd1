"""Methods of the pipelines that make CUDA inference faster and change nothing but the last bits of rounding."""

from __future__ import annotations

from typing import Any

from sana_sprint import backends
from sana_sprint.backends.cuda.graphs import DEFAULT_LIMIT, CallGraphs, StepGraphs


class AccelerationMethods:
    """None of these methods may run while the pipeline is drawing."""

    transformer: Any
    text_encoder: Any
    vae: Any

    def enable_fused_kernels(self, enabled: bool = True) -> None:
        """Run the memory-bound operations of all models as fused Triton kernels.

        They serve inference on GPUs from Ampere on; everything else runs as without them, so this may stay on.

        Raises:
            ValueError: if Triton is not installed, or there is no transformer.
        """
        for model in (self._accelerated(), *self._others()):
            backends.use_kernels(model, enabled)

    def enable_cuda_graphs(self, enabled: bool = True, *, limit: int = DEFAULT_LIMIT) -> None:
        """Record each new shape of what the models do as a CUDA graph, and launch it as a whole from then on.

        Shapes differ in batch, size and the caption's tokens, rounded up to 32. Training and other devices run as without,
        and so do pictures of more than four times 1024 x 1024 pixels at once, where launching takes no time worth saving.

        Args:
            enabled: False forgets all graphs.
            limit: graphs kept for each model; the one unused for longest makes room.

        Raises:
            ValueError: for a limit below 1, or if there is no transformer.
        """
        backends.record(self._accelerated(), StepGraphs(limit) if enabled else None)
        for model in self._others():
            backends.record(model, CallGraphs(limit) if enabled else None)

    def _others(self) -> list[Any]:
        parts = (self.text_encoder, self.vae, getattr(self, "controlnet", None))
        return [part for part in parts if part is not None]

    def _accelerated(self) -> Any:
        if self.transformer is None:
            raise ValueError("this pipeline was made without transformer, which is what would be accelerated")
        return self.transformer
