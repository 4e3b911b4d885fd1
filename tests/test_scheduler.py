"""The scheduler for hand-written loops, alone and against the published scheduler."""

import diffusers
import pytest
import torch

from sana_sprint.sampling import at_any_step, consistency
from sana_sprint.scheduler import SchedulerConfig, SCMScheduler
from tests.test_sampling import SHAPE, normal, seeded


def drive(scheduler, steps: int, **settings) -> tuple[torch.Tensor, list[float]]:
    """The published loop by hand, with a network that is a fixed function of its input."""
    scheduler.set_timesteps(steps, **settings)
    generator, latents = seeded(5), normal(3) * scheduler.config.sigma_data
    for t in scheduler.timesteps[:-1]:
        model_output = torch.tanh(latents / scheduler.config.sigma_data + t) * scheduler.config.sigma_data
        latents, clean = scheduler.step(model_output, t, latents, generator=generator, return_dict=False)
    return clean, scheduler.timesteps.tolist()


@pytest.mark.parametrize("sigma_data", [0.5, 0.8])
@pytest.mark.parametrize(
    ("steps", "theirs"),
    [
        (1, {"intermediate_timesteps": None}),
        (2, {"intermediate_timesteps": None}),
        (5, {"intermediate_timesteps": None, "max_timesteps": 1.4}),
        (2, {}),
        (2, {"max_timesteps": 1.5683, "intermediate_timesteps": 1.1}),
        (
            4,
            {
                "timesteps": [1.5683, 1.3, 1.1, 0.6, 0.0],
                "max_timesteps": None,
                "intermediate_timesteps": None,
            },
        ),
    ],
)
def test_hand_driven_loop_equals_the_published_one(steps, theirs, sigma_data):
    reference, times = drive(diffusers.SCMScheduler(sigma_data=sigma_data), steps, **theirs)
    found, own_times = drive(SCMScheduler(sigma_data=sigma_data), steps, **theirs)
    assert own_times == pytest.approx(times, abs=1e-6)  # equal distances are rounded to fp32 at other places
    torch.testing.assert_close(
        found, reference, atol=1e-6, rtol=0
    )  # the same fp32 operations on numbers around 1


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_scheduler_takes_any_number_of_steps_with_its_defaults(steps):
    with pytest.raises(ValueError, match="not supported"):  # the published one, with its own defaults
        diffusers.SCMScheduler().set_timesteps(steps)
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.num_inference_steps == steps
    assert scheduler.timesteps.shape == (steps + 1,)


def test_scheduler_and_loop_agree():
    """`consistency` in unit space is the hand-driven loop in data space."""
    clean, times = drive(SCMScheduler(), 4)
    generator = seeded(5)
    found = consistency(
        at_any_step(lambda u, t: torch.tanh(u + t[:, None, None, None])),
        normal(3),
        times,
        draw_noise=lambda: torch.randn(SHAPE, generator=generator),
    )
    torch.testing.assert_close(found * 0.5, clean, atol=1e-6, rtol=0)  # scaling by 0.5 is exact, sums are not


def test_loops_by_hand_may_share_a_generator_as_with_the_published_scheduler():
    """It draws after the last step too, for nothing."""
    generators = []
    for scheduler in (diffusers.SCMScheduler(), SCMScheduler()):
        scheduler.set_timesteps(2)
        generator = seeded()
        for t in scheduler.timesteps[:-1]:
            scheduler.step(normal(0), t, normal(1), generator=generator)
        generators.append(generator.get_state())
    assert torch.equal(*generators)


def test_step_needs_no_hidden_index_and_takes_a_batch_of_times():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    first, second = scheduler.timesteps[:-1]
    output, sample_ = normal(0), normal(1)
    one = scheduler.step(output, second.expand(2), sample_)
    scheduler.step(output, first, sample_, generator=seeded())
    again = scheduler.step(output, float(second), sample_)
    assert torch.equal(one.prev_sample, again.prev_sample)
    assert torch.equal(one.prev_sample, one.pred_original_sample)  # the last step adds no noise
    assert torch.equal(one[1], one.pred_original_sample)


def test_step_takes_a_generator_per_image():
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    both, _ = scheduler.step(normal(0), t, normal(1), generator=[seeded(7), seeded(8)])
    alone, _ = scheduler.step(normal(0)[1:], t, normal(1)[1:], generator=[seeded(8)])
    assert torch.equal(both[1:], alone)


def test_step_refuses_what_is_not_its_time():
    scheduler = SCMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(normal(0), 1.3, normal(1))
    scheduler.set_timesteps(2)
    for wrong in (1.2, 0.0):
        with pytest.raises(ValueError, match=rf"\(1.5708, 1.3\), got: {wrong:g}"):
            scheduler.step(normal(0), wrong, normal(1))
    with pytest.raises(ValueError, match="num_inference_steps or timesteps"):
        scheduler.set_timesteps()


def test_scheduler_folder_in_both_directions(tmp_path):
    SCMScheduler(sigma_data=0.7).save_pretrained(tmp_path / "ours" / "scheduler")
    theirs = diffusers.SCMScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    assert (theirs.config.sigma_data, theirs.config.prediction_type) == (0.7, "trigflow")
    diffusers.SCMScheduler(sigma_data=0.6, num_train_timesteps=500).save_pretrained(tmp_path / "theirs")
    found = SCMScheduler.from_pretrained(tmp_path / "theirs")
    assert found.config == SchedulerConfig(sigma_data=0.6, num_train_timesteps=500)
    assert SCMScheduler.from_config(theirs.config).config.sigma_data == 0.7
    assert SCMScheduler.from_config(found.config).config == found.config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"_class_name": "DPMSolverMultistepScheduler"}', "config of a DPMSolverMultistepScheduler"),
        ('{"sigma_dat": 0.5}', "unknown fields .* sigma_dat"),
        ('{"prediction_type": "epsilon"}', "'trigflow', got: 'epsilon'"),
        ('{"sigma_data": 0}', "sigma_data must be above 0, got: 0"),
        ("[]", "cannot load"),
        ("{", "cannot load"),
        (None, "cannot load"),
    ],
)
def test_bad_scheduler_folder_is_one_clear_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "scheduler_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        SCMScheduler.from_pretrained(tmp_path)
