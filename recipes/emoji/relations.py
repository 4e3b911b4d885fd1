"""Teaches the teacher's text encoder what "left of" says: `python -m recipes.emoji.relations`.

Trained along with the teacher, it learns nouns and then hides everything else: which of two objects stands left changes
the loss only at the highest noise, and only once both the text encoder and the transformer know of it. After 2800 steps
the token of the second noun hardly depends on the relation before it (docs/log.md). A published text encoder is a language model,
which knows relations from its own training; this small one learns them here, from captions alone. Four queries attend to its tokens
and must say what stands on the left, on the right, at the top and at the bottom, while the embeddings stay near the old ones, so
that the transformer still understands them. The queries are then thrown away.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.emoji import vocabulary as words
from recipes.emoji.scenes import Scene, describe, sample_scene
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.train.models.text_encoder import save_text
from sana_sprint.train.optim.optimizers import clip, make_optimizers, rate, set_rate
from sana_sprint.train.sections import OptimizerConfig
from sana_sprint.train.stages.captions import embed

PLACES = ("left", "right", "top", "bottom")
KINDS = tuple(words.KINDS)
NOTHING = len(KINDS)  # the answer where a scene says nothing of a place
NUM_WITH_RELATION, NUM_OTHERS = 80, 24  # captions of a step
INSTRUCTION_RATE, INSTRUCTION_SHARE = (
    0.15,
    0.2,
)  # of the steps; of their captions, because the instruction is long
KEEP_WEIGHT = 0.5
OPTIMIZER = OptimizerConfig(
    name="muon", learning_rate=1e-3, matrix_learning_rate=1.5e-3, warmup_steps=50, decay_fraction=0.4
)


class Readout(nn.Module):
    """Predicts the object at each place by attention of one query per place over the tokens. (B,L,D), mask (B,L) -> (B,4,kinds + 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(PLACES), width))
        self.attention = nn.MultiheadAttention(width, num_heads=8, batch_first=True)
        self.kind = nn.Linear(width, NOTHING + 1)

    def forward(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        query = self.query.expand(len(embeds), -1, -1)
        found, _ = self.attention(query, embeds, embeds, key_padding_mask=~mask, need_weights=False)
        logits: Tensor = self.kind(found)
        return logits


def main() -> None:
    """Trains, reports, and writes a folder like the teacher's, with another text encoder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=Path("runs/emoji/teacher/final"))
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/relations"))
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(arguments.teacher / "tokenizer")
    text_encoder = load_text_encoder(arguments.teacher / "text_encoder", dtype=torch.float32)
    before = CachedPromptEncoder(tokenizer, copy.deepcopy(text_encoder).requires_grad_(False))
    encoder = CachedPromptEncoder(tokenizer, text_encoder.train())
    train(encoder, before, arguments.steps)
    save_text(tokenizer, text_encoder, arguments.output)
    for part in ("transformer", "vae"):
        shutil.copytree(arguments.teacher / part, arguments.output / part, dirs_exist_ok=True)
    print(f"wrote {arguments.output}")


def train(encoder: CachedPromptEncoder, before: CachedPromptEncoder, steps: int) -> None:
    """Trains the encoder in place and prints how often it knows what stands where."""
    learner = nn.ModuleDict(
        {"encoder": encoder.text_encoder, "readout": Readout(encoder.text_encoder.config.hidden_size)}
    )
    optimizers = make_optimizers(list(learner.named_parameters()), OPTIMIZER)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    rng = random.Random(0)
    for step in range(steps):
        instruction = rng.random() < INSTRUCTION_RATE
        share = INSTRUCTION_SHARE if instruction else 1.0
        asked = [
            sample_scene(step * NUM_WITH_RELATION + i, task="position")
            for i in range(int(NUM_WITH_RELATION * share))
        ]
        others = [sample_scene(step * NUM_OTHERS + i) for i in range(int(NUM_OTHERS * share))]
        captions = [describe(scene, rng) for scene in (*asked, *others)]
        answers = torch.tensor([answer(scene) for scene in asked])
        with torch.autocast("cpu", torch.bfloat16):
            new = embed(encoder, captions, instruction=instruction)
            with torch.no_grad():
                old = embed(before, captions, instruction=instruction)
        new_embeds, mask = new.embeds.float(), new.mask.bool()
        logits = learner["readout"](new_embeds[: len(asked)], mask[: len(asked)])
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        change = (new_embeds - old.embeds.float()).square().mean(dim=-1)[mask].mean()
        set_rate(optimizers, rates, rate(step, steps, OPTIMIZER))
        (loss + KEEP_WEIGHT * change).backward()
        clip(list(learner.parameters()), OPTIMIZER.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        learner.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            known = accuracy(logits, answers)
            print(
                f"{step + 1}: loss {loss.item():.3f}, right {known:.0%}, embeddings moved by {change.item():.3f}",
                flush=True,
            )


def answer(scene: Scene) -> list[int]:
    """For each of `PLACES` the number of the kind that stands there, or `NOTHING`."""
    across = scene.relation in ("left of", "right of")
    kinds = [placed.kind for placed in sorted(scene.objects, key=lambda o: o.x if across else o.y)]
    pair = [KINDS.index(kind) for kind in kinds]
    return [*pair, NOTHING, NOTHING] if across else [NOTHING, NOTHING, *pair]


def accuracy(logits: Tensor, answers: Tensor) -> float:
    """Share of the places that hold something which are answered rightly."""
    asked = answers != NOTHING
    return (logits.argmax(dim=-1) == answers)[asked].float().mean().item()


if __name__ == "__main__":
    main()
