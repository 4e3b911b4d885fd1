"""Turns a student back into a model that a teacher's run can start from: `python -m recipes.emoji.restore_teacher`.

A student has its teacher's architecture plus a guidance embedding. At one guidance scale that embedding is a constant, which is
added to the time embedding's bias; the result has the form of a teacher, and a few hundred steps of flow matching make it one
again (`refine.toml` with `start=...`). The first stages need not be trained if the embedded model is at hand.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from recipes.emoji.export import EMBEDDED
from sana_sprint.models.layers import ScalarEmbedder
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.weights import load_model, save_model


def main() -> None:
    """Writes a folder that a teacher's run can start from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, default=EMBEDDED, help="a pipeline folder")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/restored"))
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="the smallest it knows: most like a teacher's"
    )
    arguments = parser.parse_args()
    student = load_model(SanaTransformer2DModel, arguments.student / "transformer", dtype=torch.float32)
    save_model(without_guidance(student, arguments.guidance), arguments.output / "transformer")
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(arguments.student / part, arguments.output / part, dirs_exist_ok=True)
    print(f"wrote {arguments.output}")


@torch.no_grad()
def without_guidance(student: SanaTransformer2DModel, scale: float) -> SanaTransformer2DModel:
    """A transformer without guidance embedding that computes what the student computes at this scale."""
    embedder = student.get_submodule("time_embed.guidance_embedder")
    assert isinstance(embedder, ScalarEmbedder)
    constant = embedder(torch.tensor([scale]) * student.config.guidance_embeds_scale)[0]
    state = {
        name.replace("time_embed.timestep_embedder.", "time_embed.emb.timestep_embedder."): value.clone()
        for name, value in student.state_dict().items()
        if ".guidance_embedder." not in name
    }
    state["time_embed.emb.timestep_embedder.linear_2.bias"] += constant
    teacher = SanaTransformer2DModel(replace(student.config, guidance_embeds=False))
    teacher.load_state_dict(state)
    return teacher


if __name__ == "__main__":
    main()
