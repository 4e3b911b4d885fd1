"""Methods of the pipelines that make CUDA inference faster and change nothing but the last bits of rounding."""

from __future__ import annotations

from typing import Any

from sana_sprint.backends.cuda.autoencoder import use_fused_pixels
from sana_sprint.backends.cuda.graphs import DEFAULT_LIMIT, CallGraphs, StepGraphs
from sana_sprint.backends.cuda.text_encoder import use_fused_norms
from sana_sprint.backends.cuda.transformer import use_fused_kernels


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
        for model in (self._accelerated(), getattr(self, "controlnet", None)):
            if model is not None:
                use_fused_kernels(model, enabled)
        if self.vae is not None:
            use_fused_pixels(self.vae, enabled)
        if self.text_encoder is not None:
            use_fused_norms(self.text_encoder, enabled)

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
        self._accelerated().graphs = StepGraphs(limit) if enabled else None
        for model in (self.text_encoder, self.vae, getattr(self, "controlnet", None)):
            if model is not None:
                model.graphs = CallGraphs(limit) if enabled else None

    def _accelerated(self) -> Any:
        if self.transformer is None:
            raise ValueError("this pipeline was made without transformer, which is what would be accelerated")
        return self.transformer
