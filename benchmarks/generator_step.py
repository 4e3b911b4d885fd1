"""Times one student update of the hybrid distillation, ours beside the public research script's.

    python benchmarks/generator_step.py --script train_sana_sprint_diffusers.py

The script is examples/research_projects/sana/train_sana_sprint_diffusers.py of huggingface/diffusers. Its classes are
imported from that file; its update is a branch of its main() and cannot be called, so `Reference.step` makes the same
evaluations with them: the teacher with and without the captions as one batch of 2B without gradient, the forward-mode
tangent of the student with its plain attention, the student with gradient at the same point, the student with gradient
at times of which half are the greatest, the discriminator on that, one backward pass, clipping, AdamW. The losses of
`StudentStage` are our side. Reading pictures and encoding prompts is in neither.

Three sides take turns in one process: ours; the script as it is, whose processor for plain attention replaces the
student's linear self-attention too ("script"); and the script with that put right ("corrected"). All have one set of
weights and one batch. The corrected script's guided teacher and tangent are compared with ours first, in fp32.

--precision bf16 is each side's own mixed precision: ours autocast over fp32 weights, the script's bf16 weights. Captions
fill a part of the 300 positions the script always computes, as prompts do; --full-captions fills all.

Peak memory is the process's greatest resident size (in a process of its own for each side, three updates) less its size
before the models are built: what a machine must have for the update, weights and optimiser states included, libraries not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tangent import SHAPES
from torch import Tensor

from sana_sprint import backends
from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.config import StudentRun
from sana_sprint.train.data.sampler import Part
from sana_sprint.train.distillation import Batch, Distillation, Samples
from sana_sprint.train.losses import SCM
from sana_sprint.train.models.student import Student, with_guidance
from sana_sprint.train.stages.student import make_losses
from sana_sprint.trigflow import add_noise, flow_denoiser, lognormal_times

SIDES = ("ours", "script", "corrected")
TOKENS = 300  # positions of the script's captions
GUIDANCE = (4.0, 4.5, 5.0)
CLIP_NORM, LEARNING_RATE, ADVERSARIAL_WEIGHT = 0.1, 1e-6, 0.5  # the script's defaults
MAX_TIME_RATE = 0.5


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="embedded")
    parser.add_argument("--batch", type=int, help="samples (default: the shape's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--full-captions", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help="three updates of one side; prints its peak MiB")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps(peak_memory(arguments)))
        return
    check_agreement(arguments)
    times = alternate(arguments)
    memory = {side: peak_in_subprocess(side) for side in SIDES}
    report(times, memory, arguments)


# --- Inputs of both sides ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A teacher's config and weights, clean latents (B,C,H,W), and captions (B,TOKENS,channels) with their mask."""

    config: TransformerConfig
    weights: dict[str, Tensor]
    u0: Tensor
    text: Tensor
    mask: Tensor
    head_blocks: tuple[int, ...]


def make_task(arguments: argparse.Namespace) -> Task:
    values, batch, side, _ = SHAPES[arguments.shape]
    batch = arguments.batch or batch
    generator = torch.Generator().manual_seed(0)
    config = TransformerConfig.from_dict({**values, "guidance_embeds": False, "timestep_scale": 0.001})
    model = backends.apply(SanaTransformer2DModel(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    lengths = torch.randint(16, 128, (batch, 1), generator=generator)
    mask = torch.arange(TOKENS) < (TOKENS if arguments.full_captions else lengths)
    return Task(
        config=config,
        weights=model.state_dict(),
        u0=torch.randn(batch, config.in_channels, side, side, generator=generator),
        text=torch.randn(batch, TOKENS, config.caption_channels, generator=generator),
        mask=mask.expand(batch, -1),
        # As the published 2, 8, 14, 19 of 20: the last block, and others evenly before it.
        head_blocks=tuple(sorted({config.num_layers * (k + 1) // 4 - 1 for k in range(4)})),
    )


# --- Our side --------------------------------------------------------------------------------------------------------


class TaskModels:
    """The task's teacher and a student that starts as it, as the student stage has them."""

    def __init__(self, task: Task) -> None:
        self.teacher = backends.apply(SanaTransformer2DModel(task.config)).requires_grad_(False)
        self.teacher.load_state_dict(task.weights)
        self.student = with_guidance(self.teacher)
        self.trained = self.student

    def context(
        self, model: SanaTransformer2DModel, embeds: Tensor, mask: Tensor | None, indices: Tensor
    ) -> CaptionContext:
        return model.encode_caption(embeds, mask)


class Ours:
    """The distillation of the student stage with models made in memory, so that it needs no folders."""

    def __init__(self, task: Task, precision: str, device: torch.device | str = "cpu") -> None:
        self.task = task
        config = StudentRun.model_validate(
            {
                "stage": "student",
                "output": "unused",
                "teacher": "unused",
                "precision": precision,
                "data": {"source": "unused"},
                "optimizer": {},
                "schedule": {"steps": 1, "batch_size": len(task.u0)},
                "guidance_scales": GUIDANCE,
                "max_time_rate": MAX_TIME_RATE,
                "discriminator": {
                    "blocks": task.head_blocks,
                    "weight": ADVERSARIAL_WEIGHT,
                    "optimizer": {},
                },
            }
        )
        self.models = TaskModels(task)
        for model in (self.models.teacher, self.models.student):
            model.to(device)
        self.autocast = mixed_precision(precision)
        self.distillation = Distillation(
            config,
            self.models,
            cache=None,  # `batch` hands in the samples
            embed=None,
            device=torch.device(device),
            autocast=lambda: self.autocast,
            report=print,
        )
        self.losses = make_losses(self.distillation, config.sections())
        self.student = Student(self.models.student, task.u0[0].numel()).to(device)
        self.distillation.student = self.student
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE)

    def step(self) -> None:
        with self.autocast:
            batch = self.batch()
            loss = sum(each.student(batch)[0] for each in self.losses)
        update(loss, self.optimizer)

    def batch(self, guidance: Tensor | None = None) -> Batch:
        task = self.task
        length = int(task.mask.sum(1).max())
        text, mask = task.text[:, :length], task.mask[:, :length]
        count = len(text)
        with torch.no_grad():
            captioned = self.models.teacher.encode_caption(text, mask)
        batch = Batch(self.distillation, Part(10**6, range(count)), is_students_turn=True)
        batch.samples = Samples(
            u0=task.u0,
            captions=[""] * count,  # unused, since captions are already encoded
            instruction=False,
            embeddings=PromptEmbeddings(text, mask, (0,) * count),
            guidance=draw_guidance(count) if guidance is None else guidance,
            captioned=captioned,
            indices=torch.arange(count),
        )
        return batch

    def tangent(self, u: Tensor, t: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """The guided teacher's F and the scaled tangent of the student."""
        batch, student = self.batch(guidance), self.models.student
        (scm,) = (each for each in self.losses if isinstance(each, SCM))
        with torch.no_grad():
            teacher_F = flow_denoiser(batch.teacher)(u, t)
            return teacher_F, scm.tangent(student, batch.context, u, t, teacher_F, guidance)


# --- The script's side -----------------------------------------------------------------------------------------------


def load_script(path: Path) -> Any:
    """The script as a module. Two packages that only its data loading needs are stood in for where they are missing."""
    # Before the stand-ins, with which these libraries would take torchvision for installed.
    from diffusers import SanaPipeline, SanaSprintPipeline  # noqa: F401
    from transformers import AutoTokenizer, Gemma2Model  # noqa: F401

    names = ("torchvision", "torchvision.transforms", "datasets")
    missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(load_dataset=None, transforms=None)
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in missing:
        del sys.modules[name]
    return module


class Reference:
    """The script's models, set up and evaluated as in its main(). u stands for its x_t / sigma_data."""

    def __init__(self, task: Task, precision: str, script: Any, *, corrected: bool) -> None:
        from diffusers import SanaTransformer2DModel as Published

        self.task, self.script = task, script
        values = {key: value for key, value in task.config.to_dict().items() if key != "guidance_embeds"}
        teacher = Published(**values, guidance_embeds=False)
        teacher.load_state_dict(task.weights)
        student = Published(**values, guidance_embeds=True)
        zeros = {
            k: torch.zeros_like(v) for k, v in student.state_dict().items() if ".guidance_embedder." in k
        }
        renamed = {k.replace("time_embed.emb.", "time_embed."): v for k, v in task.weights.items()}
        student.load_state_dict({**renamed, **zeros})
        plain = script.SanaVanillaAttnProcessor()
        if corrected:
            student.set_attn_processor(
                {name: plain if ".attn2." in name else own for name, own in student.attn_processors.items()}
            )
        else:
            student.set_attn_processor(plain)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.student = script.SanaTrigFlow(student, guidance=True).train().to(dtype)
        self.teacher = script.SanaTrigFlow(teacher, guidance=False).eval().requires_grad_(False).to(dtype)
        self.judge = script.SanaMSCMDiscriminator(
            self.teacher, is_multiscale=True, head_block_ids=list(task.head_blocks)
        ).to(dtype)
        self.judge.heads.requires_grad_(True)
        self.judge.eval()
        self.autocast = mixed_precision(precision)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=LEARNING_RATE)
        self.captions = {
            "encoder_hidden_states": task.text.to(dtype),
            "encoder_attention_mask": task.mask.to(torch.int64),
        }
        # The empty prompt: bos alone is not masked.
        alone = (torch.arange(TOKENS) < 1).expand_as(task.mask).to(torch.int64)
        empty = {"encoder_hidden_states": task.text.to(dtype), "encoder_attention_mask": alone}
        self.both = {name: torch.cat([empty[name], self.captions[name]]) for name in self.captions}

    def step(self) -> None:
        task = self.task
        count = len(task.u0)
        t = draw_times(count)
        u = add_noise(task.u0, torch.randn_like(task.u0), t)
        guidance = draw_guidance(count)
        with self.autocast:
            teacher_F, tangent = self.tangent(u, t, guidance)
            F, logvar = self.student(
                hidden_states=u, timestep=t, guidance=guidance * 0.1, return_logvar=True, **self.captions
            )
        t4 = t[:, None, None, None]
        cos, sin = torch.cos(t4), torch.sin(t4)
        fixed = F.detach()
        g = -(cos**2) * (fixed - teacher_F) - (cos * sin * u + tangent)
        g = g / (torch.linalg.vector_norm(g, dim=(1, 2, 3), keepdim=True) + 0.1)
        logvar = logvar[:, :, None, None]
        scm = ((F - fixed - g).square() / (0.5 * torch.tan(t4)) / torch.exp(logvar) + logvar).mean()
        with self.autocast:
            loss = scm + ADVERSARIAL_WEIGHT * self.adversarial(guidance)
        update(loss, self.optimizer)

    def tangent(self, u: Tensor, t: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """The guided teacher's F and the scaled tangent of the student."""
        t4 = t[:, None, None, None]
        with torch.no_grad():
            F = self.teacher(hidden_states=torch.cat([u, u]), timestep=torch.cat([t, t]), **self.both)[0]
            without, with_caption = F.chunk(2)
            teacher_F = without + guidance[:, None, None, None] * (with_caption - without)

            def student(u: Tensor, t4: Tensor) -> tuple[Tensor, Tensor]:
                result: tuple[Tensor, Tensor] = self.student(
                    hidden_states=u,
                    timestep=t4.flatten(),
                    guidance=guidance * 0.1,
                    jvp=True,
                    return_logvar=True,
                    **self.captions,
                )
                return result

            factor = torch.cos(t4) * torch.sin(t4)
            tangent: Tensor = torch.func.jvp(student, (u, t4), (factor * teacher_F, factor), has_aux=True)[1]
        return teacher_F, tangent

    def adversarial(self, guidance: Tensor) -> Tensor:
        u0 = self.task.u0
        t = draw_times(len(u0))
        t = torch.where(torch.rand_like(t) < MAX_TIME_RATE, 1.5708, t)
        u = add_noise(u0, torch.randn_like(u0), t)
        F = self.student(hidden_states=u, timestep=t, guidance=guidance * 0.1, **self.captions)[0]
        t4 = t[:, None, None, None]
        fake = torch.cos(t4) * u - torch.sin(t4) * F
        s = lognormal_times(len(u0), mean=-0.6, std=1.0)
        noised = add_noise(fake, torch.randn_like(fake), s)
        logits: Tensor = self.judge(hidden_states=noised, timestep=s, **self.captions)
        return -logits.mean()


# --- Shared parts, measuring -----------------------------------------------------------------------------------------


def mixed_precision(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def draw_times(count: int) -> Tensor:
    return lognormal_times(count, mean=0.2, std=1.6)


def draw_guidance(count: int) -> Tensor:
    return torch.tensor(GUIDANCE)[torch.randint(len(GUIDANCE), (count,))]


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_side(side: str, task: Task, arguments: argparse.Namespace, precision: str) -> Ours | Reference:
    if side == "ours":
        return Ours(task, precision)
    return Reference(task, precision, load_script(arguments.script), corrected=side == "corrected")


def check_agreement(arguments: argparse.Namespace) -> None:
    """Exits unless both sides compute the same values; 1e-3 leaves room for fp32 rounding through the whole network."""
    task = make_task(arguments)
    torch.manual_seed(0)
    t, u = draw_times(len(task.u0)), torch.randn_like(task.u0)
    guidance = draw_guidance(len(u))
    ours = make_side("ours", task, arguments, "fp32").tangent(u, t, guidance)
    theirs = make_side("corrected", task, arguments, "fp32").tangent(u, t, guidance)
    for name, a, b in zip(("teacher", "tangent"), ours, theirs, strict=True):
        difference = ((a - b).norm() / b.norm()).item()
        print(f"{name}: relative difference from the corrected script {difference:.1e}")
        if difference > 1e-3:
            raise SystemExit("the sides do not compute the same thing")


def alternate(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one that does not count."""
    task = make_task(arguments)
    sides = {side: make_side(side, task, arguments, arguments.precision) for side in SIDES}
    # With one thread, the processor's time of this process: other work on the machine does not count.
    clock: Callable[[], float] = time.process_time if arguments.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds + 1):
        for name, side in sides.items():
            start = clock()
            side.step()
            times[name].append(clock() - start)
    return {side: seconds[1:] for side, seconds in times.items()}


def peak_memory(arguments: argparse.Namespace) -> float:
    """MiB by which three updates of one side raise the greatest resident size (Linux)."""
    load_script(arguments.script)  # both sides start with the same libraries
    task = make_task(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the greatest size so far is now the present one
    before = greatest_resident_size()
    side = make_side(arguments.side, task, arguments, arguments.precision)
    for _ in range(3):
        side.step()
    return greatest_resident_size() - before


def greatest_resident_size() -> float:
    """Returns the peak resident size in MiB. getrusage is no use: a child starts with its parent's value."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def peak_in_subprocess(side: str) -> float:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def report(times: dict[str, list[float]], memory: dict[str, float], arguments: argparse.Namespace) -> None:
    """Ratios are ours to the others': the median of the rounds' own ratios."""
    print(
        f"\n{arguments.shape}, {arguments.precision}, {arguments.threads} thread(s), {arguments.rounds} rounds"
    )
    print(f"{'':<12}{'s':>8}{'ours is':>10}{'peak MiB':>10}{'ours is':>10}")
    results = {}
    for side, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["ours"], seconds, strict=True))
        results[side] = {
            "seconds": statistics.median(seconds),
            "time_ratio": ratio,
            "peak_mib": memory[side],
            "memory_ratio": memory["ours"] / memory[side],
        }
        print("{:<12}{:>8.2f}{:>10.2f}{:>10.0f}{:>10.2f}".format(side, *results[side].values()))
    settings = {key: value for key, value in vars(arguments).items() if key not in ("script", "side")}
    print(json.dumps({**settings, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
