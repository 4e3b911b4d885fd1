"""Calls of the text-to-image pipeline: times, noise, prompts, callbacks, interruption, the scheduler."""

import builtins
import logging

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

import sana_sprint
from sana_sprint.notices import warn_once
from tests.helpers.pipeline import LONG, PROMPT, seeded
from tests.helpers.published import assert_same, both_refuse, quiet, same


def draw(pipe, prompt=PROMPT, **settings):
    """Latents of a picture, or of what `prompt` says."""
    return pipe(prompt, output_type="latent", **settings).images


def test_the_default_call(folder):
    found = same(lambda lib, folder: draw(quiet(lib, folder), generator=seeded()), folder)
    assert found.std() > 0.3  # random weights that draw something


def test_the_default_picture(folder):
    same(lambda lib, folder: quiet(lib, folder)(PROMPT, generator=seeded()), folder)


@pytest.mark.parametrize(("height", "width"), [(1200, 1500), (1111, 1777), (1409, 720)])
def test_pictures_of_sizes_between_the_buckets(folder, height, width):
    """Enlarged and cropped. Shrinking is antialiased here, and plain there."""

    def run(lib, folder):
        return quiet(lib, folder)(PROMPT, height=height, width=width, generator=seeded())

    same(run, folder)


def test_prompt_and_embeddings_together_are_refused(folder):
    def both(lib, folder):
        return draw(quiet(lib, folder), prompt_embeds=torch.zeros(1, 2, 32))

    both_refuse(both, folder, match="either prompt or prompt_embeds")


# ----- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("first", [1.57080, 1.2])
def test_without_intermediate_time_any_number_of_steps(folder, steps, first):
    def run(lib, folder):
        return draw(
            quiet(lib, folder),
            num_inference_steps=steps,
            max_timesteps=first,
            intermediate_timesteps=None,
            generator=seeded(),
        )

    same(run, folder)


def test_a_given_intermediate_time(folder):
    for middle in (1.3, 0.9):
        same(
            lambda lib, folder, middle=middle: draw(
                quiet(lib, folder), intermediate_timesteps=middle, generator=seeded()
            ),
            folder,
        )


@pytest.mark.parametrize("steps", [1, 3, 4, 20])
def test_a_given_intermediate_time_for_other_numbers_of_steps_is_refused(folder, steps):
    def run(lib, folder):
        return draw(quiet(lib, folder), num_inference_steps=steps, intermediate_timesteps=1.3)

    both_refuse(run, folder, match=f"for 2 steps, not for {steps}", error=ValueError)


@pytest.mark.parametrize("steps", [1, 3, 4, 20])
def test_the_default_intermediate_time_keeps_the_papers_times_where_diffusers_raises(folder, steps):
    with pytest.raises(ValueError, match="not supported"):
        draw(quiet(diffusers, folder), num_inference_steps=steps)
    output = quiet(sana_sprint, folder)(PROMPT, num_inference_steps=steps, output_type="latent")
    assert output.num_inference_steps == steps
    assert output.times[0] == 1.57080
    if steps == 4:
        assert output.times[1:] == (1.3, 1.1, 0.6, 0.0)  # table 7


def test_the_default_intermediate_time_gives_way_to_a_first_time_below_it(folder):
    """diffusers makes times that rise from 1.2 to 1.3."""
    output = quiet(sana_sprint, folder)(PROMPT, max_timesteps=1.2, output_type="latent")
    assert output.times[0] == 1.2
    assert 0 < output.times[1] < 1.2
    with pytest.raises(ValueError, match=r"below the first time, 1.2; got: 1.3"):
        quiet(sana_sprint, folder)(PROMPT, max_timesteps=1.2, intermediate_timesteps=1.3)


def test_neither_first_nor_intermediate_time_is_refused(folder):
    def run(lib, folder):
        return draw(quiet(lib, folder), max_timesteps=None, intermediate_timesteps=None)

    both_refuse(run, folder, match="cannot both be None", error=ValueError)


@pytest.mark.parametrize("times", [{"max_timesteps": 1.5}, {"intermediate_timesteps": 1.3}])
def test_times_of_two_kinds_are_refused(folder, times):
    def run(lib, folder):
        return draw(quiet(lib, folder), timesteps=[1.5, 1.0, 0.5, 0.0], num_inference_steps=3, **times)

    both_refuse(run, folder, match="cannot be given along with timesteps")


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_the_schedulers_times(folder, steps):
    def run(lib, folder):
        scheduler = lib.SCMScheduler()
        scheduler.set_timesteps(steps, intermediate_timesteps=None)
        return scheduler.timesteps

    same(run, folder)

    def with_its_defaults_changed(lib, folder):
        lib.SCMScheduler().set_timesteps(4, intermediate_timesteps=1.3)

    both_refuse(with_its_defaults_changed, folder, match="for 2 steps, not for 4", error=ValueError)


# ----- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_generator_over_several_calls(folder, steps):
    def run(lib, folder):
        pipe, generator = quiet(lib, folder), seeded()
        settings = {"num_inference_steps": steps, "intermediate_timesteps": None, "generator": generator}
        return [draw(pipe, **settings) for _ in range(3)]

    first, second, _ = same(run, folder)
    assert (first - second).abs().max() > 0.1


def test_a_list_of_generators_over_several_calls(folder):
    def run(lib, folder):
        pipe, generators = quiet(lib, folder), [seeded(1), seeded(2)]
        return [draw(pipe, [PROMPT, LONG], generator=generators) for _ in range(2)]

    same(run, folder)


def test_given_latents_and_a_generator(folder):
    def run(lib, folder):
        pipe, generator = quiet(lib, folder), seeded()
        latents = torch.randn(1, 4, 32, 32, generator=generator)
        return [draw(pipe, latents=latents, generator=generator) for _ in range(2)]

    same(run, folder)


def test_prepared_latents(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        latents = pipe.prepare_latents(2, 4, 1024, 512, torch.float64, "cpu", seeded())
        cast = pipe.prepare_latents(2, 4, 1024, 512, torch.float16, "cpu", None, latents)
        return latents.float(), latents.dtype, cast.dtype

    same(run, folder)


def test_manual_seed_makes_a_call_repeatable(lib, folder):
    """Pictures of the two differ: here each has a seed of its own, drawn from the global generator, and reported."""
    pipe = quiet(lib, folder)

    def two(seed):
        torch.manual_seed(seed)
        return [draw(pipe), draw(pipe)]

    assert_same(two(3), two(3), atol=0)
    assert (two(3)[0] - two(4)[0]).abs().max() > 0.1
    assert (two(3)[0] - two(3)[1]).abs().max() > 0.1


def test_reported_seeds_repeat_the_pictures(folder):
    pipe = quiet(sana_sprint, folder)
    output = pipe([PROMPT, LONG], output_type="latent")
    again = pipe([PROMPT, LONG], seed=output.seeds, output_type="latent")
    assert torch.equal(again.images, output.images)
    assert output.seeds[1] == output.seeds[0] + 1


# ----- prompts --------------------------------------------------------------------------------------------------------

INSTRUCTION = ["Describe the picture.", "User: "]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
@pytest.mark.parametrize("length", [300, 6])
def test_encode_prompt(folder, instruction, length):
    """At all positions: also where padding stands."""

    def run(lib, folder):
        return quiet(lib, folder).encode_prompt(
            [PROMPT, LONG, ""], max_sequence_length=length, complex_human_instruction=instruction
        )

    embeds, mask = same(run, folder)
    assert embeds.shape == (3, length, 32)
    assert mask.dtype == torch.int64


def test_encode_prompt_by_position(folder):
    """The published order of arguments, up to `lora_scale`, which only concerns LoRAs of the text encoder."""

    def run(lib, folder):
        pipe = quiet(lib, folder)
        return pipe.encode_prompt(PROMPT, 2, torch.device("cpu"), None, None, True, 20, INSTRUCTION, None)

    same(run, folder)


def test_encode_prompt_of_embeddings(folder):
    def run(lib, folder):
        embeds = torch.arange(24.0).reshape(1, 3, 8)
        mask = torch.tensor([[1, 1, 0]])
        return quiet(lib, folder).encode_prompt(
            None, num_images_per_prompt=2, prompt_embeds=embeds, prompt_attention_mask=mask
        )

    same(run, folder)


def test_masks_of_several_prompts_stay_with_their_prompts(folder):
    """diffusers repeats embeddings as p0,p0,p1,p1 and masks as p0,p1,p0,p1: two pictures see too little or padding."""

    def run(lib, folder):
        return quiet(lib, folder).encode_prompt([PROMPT, LONG], num_images_per_prompt=2)

    embeds, mask = run(sana_sprint, folder)
    wrong_embeds, wrong_mask = run(diffusers, folder)
    assert_same(embeds, wrong_embeds)
    assert_same(mask[[0, 2, 1, 3]], wrong_mask)
    assert not torch.equal(mask, wrong_mask)


def test_embeddings_of_two_prompts_joined_and_blended(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        (one, one_mask), (other, other_mask) = (pipe.encode_prompt(text) for text in (PROMPT, LONG))
        joined = torch.cat([one, other]), torch.cat([one_mask, other_mask])
        # The longer prompt's mask shows what stands at the padding of the shorter one.
        blended = torch.lerp(one, other, 0.5), torch.maximum(one_mask, other_mask)
        return [
            draw(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded())
            for embeds, mask in (joined, blended)
        ]

    same(run, folder)


def test_the_embeddings_of_a_prompt_draw_its_picture(lib, folder):
    pipe = quiet(lib, folder)
    settings = {"complex_human_instruction": INSTRUCTION}
    expected = draw(pipe, [PROMPT, LONG], generator=seeded(), **settings)
    embeds, mask = pipe.encode_prompt([PROMPT, LONG], **settings)
    found = draw(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded())
    assert_same(found, expected)


@pytest.mark.parametrize("library", ["ftfy", "bs4"])
def test_captions_are_not_cleaned_without_the_libraries(folder, library, monkeypatch, caplog):
    """diffusers looks for its libraries once in a process, so it is asked for the result with `clean_caption=False`."""
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ImportError(name=name)
        return load(name, *args, **kwargs)

    pipe = quiet(sana_sprint, folder)
    expected = draw(quiet(diffusers, folder), "A Cat http://a.com", generator=seeded())
    warn_once.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING, logger="sana_sprint"):
        found = draw(pipe, "A Cat http://a.com", clean_caption=True, generator=seeded())
        draw(pipe, "A Cat http://a.com", clean_caption=True)
    assert_same(found, expected)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "sana-sprint[caption]" in message


# ----- callbacks ------------------------------------------------------------------------------------------------------

TENSORS = ["latents", "prompt_embeds"]


def test_what_a_callback_gets(folder):
    def run(lib, folder):
        seen = []

        def keep(pipe, i, t, tensors):
            values = (pipe.num_timesteps, pipe.guidance_scale, pipe.attention_kwargs, pipe.interrupt)
            seen.append((i, float(t), t.dtype, tensors["latents"].clone(), tensors["prompt_embeds"], values))
            return tensors

        pipe = quiet(lib, folder)
        settings = {"guidance_scale": 3.5, "num_inference_steps": 3, "intermediate_timesteps": None}
        draw(
            pipe,
            generator=seeded(),
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=TENSORS,
            **settings,
        )
        return seen, pipe.num_timesteps, pipe.guidance_scale, pipe._callback_tensor_inputs

    seen, *_ = same(run, folder)
    assert len(seen) == 3


def test_the_latents_of_another_sigma_data(folder):
    def run(lib, folder):
        seen = []

        def keep(pipe, i, t, tensors):
            seen.append(tensors["latents"])
            return tensors

        pipe = quiet(lib, folder, scheduler=lib.SCMScheduler(sigma_data=0.7))
        return draw(pipe, generator=seeded(), callback_on_step_end=keep), seen

    same(run, folder)


@pytest.mark.parametrize("step", [0, 1])
def test_a_callback_changes_latents(folder, step):
    """After the last step a change comes too late: the step's clean estimate is the picture."""

    def run(lib, folder):
        def change(pipe, i, t, tensors):
            return {"latents": tensors["latents"] * 0.5} if i == step else tensors

        return draw(quiet(lib, folder), generator=seeded(), callback_on_step_end=change)

    changed = same(run, folder)
    plain = draw(quiet(sana_sprint, folder), generator=seeded())
    assert torch.equal(changed, plain) == (step == 1)


def test_a_callback_changes_embeddings(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        other, _ = pipe.encode_prompt(LONG)

        def change(pipe, i, t, tensors):
            return {"prompt_embeds": torch.lerp(tensors["prompt_embeds"], other, 0.5)}

        return draw(
            pipe,
            generator=seeded(),
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )

    changed = same(run, folder)
    assert (changed - draw(quiet(sana_sprint, folder), generator=seeded())).abs().max() > 1e-3


def test_a_callback_may_return_none(folder):
    """diffusers raises: its callbacks must return a mapping."""
    pipe = quiet(sana_sprint, folder)
    assert torch.equal(
        draw(pipe, generator=seeded(), callback_on_step_end=lambda *_: None), draw(pipe, generator=seeded())
    )
    with pytest.raises(AttributeError):
        draw(quiet(diffusers, folder), callback_on_step_end=lambda *_: None)


class Halve(PipelineCallback):
    """A published callback object, whose tensors are named by itself."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert list(callback_kwargs) == ["latents"]
        return {"latents": callback_kwargs["latents"] / 2}


@pytest.mark.parametrize("callback", [Halve(), MultiPipelineCallbacks([Halve(), Halve()])])
def test_callback_objects(folder, callback):
    def run(lib, folder):
        return draw(
            quiet(lib, folder),
            generator=seeded(),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],  # the object's own names count
        )

    same(run, folder)


def test_a_published_callback_that_writes_the_guidance_scale(folder):
    """It is read back, but the picture's guidance was embedded before the first step."""

    def run(lib, folder):
        pipe = quiet(lib, folder)
        cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        return draw(pipe, generator=seeded(), callback_on_step_end=cut), pipe.guidance_scale

    _, scale = same(run, folder)
    assert scale == 0.0


def test_no_names_of_tensors(folder):
    same(
        lambda lib, folder: draw(
            quiet(lib, folder), generator=seeded(), callback_on_step_end_tensor_inputs=None
        ),
        folder,
    )


def test_unknown_tensors_for_a_callback_are_refused(folder):
    def run(lib, folder):
        return draw(
            quiet(lib, folder),
            callback_on_step_end=lambda *_: {},
            callback_on_step_end_tensor_inputs=["noise"],
        )

    both_refuse(run, folder, match="latents, prompt_embeds; got: .*noise", error=ValueError)


# ----- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("through", ["argument", "outer name"])
def test_a_callback_interrupts_its_call(folder, step, through):
    def run(lib, folder):
        pipe, steps, generator = quiet(lib, folder), [], seeded()

        def stop(argument, i, t, tensors):
            steps.append(i)
            if i == step:
                (argument if through == "argument" else pipe)._interrupt = True
            return tensors

        settings = {"num_inference_steps": 4, "intermediate_timesteps": None, "generator": generator}
        stopped = draw(pipe, callback_on_step_end=stop, **settings)
        after = pipe.interrupt
        # The next call is whole again, with the noise that comes then.
        return stopped, steps, after, draw(pipe, **settings), pipe.interrupt

    _, steps, after, _, at_last = same(run, folder)
    assert steps == list(range(step + 1))
    assert (after, at_last) == (True, False)


# ----- the scheduler --------------------------------------------------------------------------------------------------


def test_another_scheduler_is_refused_by_name_when_it_is_passed(folder):
    """diffusers fails in the call (TypeError), here the constructor, the loading and the assignment already do."""
    other = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(TypeError):
        draw(quiet(diffusers, folder, scheduler=other))
    match = "SCMScheduler, got: DPMSolverMultistepScheduler"
    with pytest.raises(ValueError, match=match):
        quiet(sana_sprint, folder, scheduler=other)
    pipe = quiet(sana_sprint, folder)
    with pytest.raises(ValueError, match=match):
        pipe.scheduler = other
    with pytest.raises(ValueError, match=match):
        sana_sprint.SanaSprintPipeline(**{**pipe.components, "scheduler": other})
    with pytest.raises(ValueError, match=match):
        sana_sprint.SanaSprintPipeline.from_pipe(pipe, scheduler=other)


def test_a_loop_by_hand(folder):
    """As the published pipeline writes it."""

    def run(lib, folder):
        scheduler, generator = lib.SCMScheduler.from_config({"sigma_data": 0.4}, sigma_data=0.6), seeded()
        scheduler.set_timesteps(3, max_timesteps=1.5, intermediate_timesteps=None)
        scheduler.set_begin_index(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.config.sigma_data
        seen = [scheduler.init_noise_sigma, scheduler.order, scheduler.begin_index, len(scheduler)]
        for t in scheduler.timesteps[:-1]:
            output = scheduler.step(torch.tanh(latents + t), t, latents, generator=generator)
            latents = output.prev_sample
            seen += [scheduler.index_for_timestep(t), latents, output.pred_original_sample, output[1]]
        return seen

    same(run, folder)


def test_the_scheduler_of_diffusers_is_taken_over(folder, tmp_path):
    def run(lib, folder):
        seen = []

        def keep(pipe, i, t, tensors):
            seen.append(tensors["latents"])
            return tensors

        pipe = quiet(lib, folder)
        pipe.scheduler = diffusers.SCMScheduler(sigma_data=0.7)
        draw(pipe, generator=seeded(), callback_on_step_end=keep)
        pipe.save_pretrained(tmp_path / lib.__name__)
        loaded = lib.SCMScheduler.from_pretrained(tmp_path / lib.__name__, subfolder="scheduler")
        return seen, pipe.scheduler.config.sigma_data, loaded.config.sigma_data

    same(run, folder)
