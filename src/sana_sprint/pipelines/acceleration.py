"""Methods of the pipelines that make CUDA inference faster and change nothing but the last bits of rounding."""

from __future__ import annotations

from typing import Any

from sana_sprint.kernels.fused import use_fused_kernels
from sana_sprint.kernels.graphs import DEFAULT_LIMIT, StepGraphs


class AccelerationMethods:
    """None of these methods may run while the pipeline is drawing."""

    transformer: Any

    def enable_fused_kernels(self, enabled: bool = True) -> None:
        """Run the transformer's memory-bound operations, and those of a control branch, as fused Triton kernels.

        They serve inference on GPUs from Ampere on; everything else runs as without them, so this may stay on.

        Raises:
            ValueError: if Triton is not installed, or there is no transformer.
        """
        for model in (self._accelerated(), getattr(self, "controlnet", None)):
            if model is not None:
                use_fused_kernels(model, enabled)

    def enable_cuda_graphs(self, enabled: bool = True, *, limit: int = DEFAULT_LIMIT) -> None:
        """Record each new shape of a transformer step as a CUDA graph, and launch it as a whole from then on.

        Shapes differ in batch, size and the caption's tokens, rounded up to 32. Steps that follow a picture, training and
        other devices run as without.

        Args:
            enabled: False forgets all graphs.
            limit: graphs kept; the one unused for longest makes room.

        Raises:
            ValueError: for a limit below 1, or if there is no transformer.
        """
        self._accelerated().graphs = StepGraphs(limit) if enabled else None

    def _accelerated(self) -> Any:
        if self.transformer is None:
            raise ValueError("this pipeline was made without transformer, which is what would be accelerated")
        return self.transformer
