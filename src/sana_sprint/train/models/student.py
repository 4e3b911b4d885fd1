"""The student: its teacher with a guidance embedding, and the learnt variance of its loss."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from sana_sprint import backends
from sana_sprint.models.layers import ScalarEmbedder, autocast_off
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.models.adaptation import spread_thresholds
from sana_sprint.train.models.base import FlowModel
from sana_sprint.trigflow import prior_weight, trig_to_flow

_GUIDANCE_STEEPNESS = 3.0


class Student(nn.Module):
    """The trained part of a transformer with guidance embedding, and the log variance of its loss.

    Args:
        transformer: with guidance embedding.
        latent_size: numbers in a latent, C*H*W.
        learning: the trained part of the transformer; None for all of it.
    """

    def __init__(self, transformer: FlowModel, latent_size: int, learning: nn.Module | None = None) -> None:
        super().__init__()
        if learning is None:
            assert isinstance(transformer, nn.Module)
            learning = transformer
        self.transformer = learning
        self._embed_time = transformer.embed_time
        self.logvar = nn.Linear(transformer.config.width, 1)
        nn.init.zeros_(self.logvar.weight)
        # The normalised target has a norm just below 1, so its mean square is near 1/latent_size.
        nn.init.constant_(self.logvar.bias, -math.log(latent_size))

    def log_variance(self, t: Tensor, guidance: Tensor) -> Tensor:
        """Of the loss at angles t (B,) and guidance scales (B,): (B,) fp32.

        log w(t) plus a linear map of the time embedding. It has the same optimum as without log w(t), the released form, and
        is initialised there. From a constant, small times outweigh large ones a thousandfold until the map has learnt w(t).
        """
        _, embedding = self._embed_time(trig_to_flow(t), guidance)
        with autocast_off(t.device):  # bf16 steps near -10 are 0.06, 6% of the loss's weight
            learnt: Tensor = self.logvar(embedding.float())
        return prior_weight(t).log() + learnt.squeeze(1)


def with_guidance(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A copy of the teacher with a guidance embedding whose last layer is zero, so that both compute the same.

    Only the last: were the first layer zero too, neither would ever get a gradient. The first starts with features
    that tell scales apart: after a random start (the released code's), those of 4 and 5 differ by 2%.

    Raises:
        ValueError: the teacher's time embedding is not dense.
    """
    if abs(teacher.config.time_scale - 1) > 1e-6:
        raise ValueError(
            f"the teacher's time is not dense: it is multiplied by {teacher.config.time_scale:g} (timestep_scale is "
            f"{teacher.config.timestep_scale:g}, 0.001 means dense); fine-tune it with an adaptation stage first"
        )
    student = SanaTransformer2DModel(replace(teacher.config, guidance_embeds=True))
    state = {
        name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()
    }
    embedder = student.get_submodule("time_embed.guidance_embedder")
    assert isinstance(embedder, ScalarEmbedder)
    spread_thresholds(embedder, _GUIDANCE_STEEPNESS)
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)
    own = {name: value for name, value in student.state_dict().items() if ".guidance_embedder." in name}
    student.load_state_dict({**state, **own})
    return backends.apply(student)
