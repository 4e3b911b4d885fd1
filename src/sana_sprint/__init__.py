"""SANA-Sprint: text to pictures in 1 to 4 network evaluations.

Importing the package loads neither torch nor transformers: each public name is imported from its module when it
is first used, so that `sana-sprint --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sana_sprint.backends.prompt_cache import CachedPromptEncoder
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.models.controlnet import SanaControlNetModel
    from sana_sprint.models.text_encoder import PromptEncoder
    from sana_sprint.models.transformer import SanaTransformer2DModel
    from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
    from sana_sprint.pipelines.output import SanaPipelineOutput, SanaSprintOutput
    from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
    from sana_sprint.scheduler import SCMScheduler
    from sana_sprint.stopping import Stopped
    from sana_sprint.weights import WeightsError

__version__ = "0.1.0"

__all__ = [
    "AutoencoderDC",
    "CachedPromptEncoder",
    "PromptEncoder",
    "SCMScheduler",
    "SanaControlNetModel",
    "SanaPipelineOutput",
    "SanaSprintControlNetPipeline",
    "SanaSprintOutput",
    "SanaSprintPipeline",
    "SanaTransformer2DModel",
    "Stopped",
    "WeightsError",
    "__version__",
]

_HOME = {
    "AutoencoderDC": "models.autoencoder",
    "CachedPromptEncoder": "backends.prompt_cache",
    "PromptEncoder": "models.text_encoder",
    "SCMScheduler": "scheduler",
    "SanaControlNetModel": "models.controlnet",
    "SanaPipelineOutput": "pipelines.output",
    "SanaSprintControlNetPipeline": "pipelines.controlnet",
    "SanaSprintOutput": "pipelines.output",
    "SanaSprintPipeline": "pipelines.text_to_image",
    "SanaTransformer2DModel": "models.transformer",
    "Stopped": "stopping",
    "WeightsError": "weights",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
