"""Every public name of the published pipeline: it is here, or reaching for it says why it is not."""

import inspect
import logging

import diffusers
import pytest

import sana_sprint
from sana_sprint.notices import warn_once
from tests.helpers.pipeline import PROMPT
from tests.helpers.published import both_refuse, quiet, same

# Reasons are in `pipelines.published`.
REFUSED = {
    "bad_punct_regex",
    "check_inputs",
    "extract_init_dict",
    "from_config",
    "get_config_dict",
    "has_compatibles",
    "ignore_for_config",
    "load_config",
    "prepare_extra_step_kwargs",
    "register_for_auto_class",
    "register_modules",
    "register_to_config",
    "save_config",
    "to_json_file",
    "to_json_string",
}
NOT_YET = {
    "config",
    "config_name",
    "delete_adapters",
    "disable_lora",
    "download",
    "enable_group_offload",
    "enable_lora",
    "enable_lora_hotswap",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "fused_loras",
    "get_list_adapters",
    "hf_device_map",
    "load_lora_into_transformer",
    "lora_scale",
    "lora_state_dict",
    "maybe_free_model_hooks",
    "model_cpu_offload_seq",
    "name_or_path",
    "num_fused_loras",
    "pack_weights",
    "push_to_hub",
    "remove_all_hooks",
    "reset_device_map",
    "save_lora_weights",
    "set_lora_device",
    "transformer_name",
    "write_lora_layers",
}
OURS = sana_sprint.SanaSprintPipeline


def published_names(folder):
    """Public attributes of the published class and of its instances."""
    pipe = quiet(diffusers, folder)
    return sorted(name for name in {*dir(type(pipe)), *vars(pipe)} if not name.startswith("_"))


def test_every_public_name_of_the_published_pipeline(folder):
    pipe = quiet(sana_sprint, folder)
    pipe(PROMPT, output_type="latent")  # some describe the last call
    missing = {name for name in published_names(folder) if not hasattr(pipe, name)}
    assert missing == REFUSED | NOT_YET


# Of the scheduler: the settings and files of a library's base class, and its count of the steps made, which `step` here
# does not need.
NOT_OF_THE_SCHEDULER = {
    "compatibles",
    "extract_init_dict",
    "get_config_dict",
    "has_compatibles",
    "ignore_for_config",
    "load_config",
    "push_to_hub",
    "register_for_auto_class",
    "register_to_config",
    "save_config",
    "step_index",
    "to_json_file",
    "to_json_string",
}


def test_every_public_name_of_the_published_scheduler():
    published, ours = diffusers.SCMScheduler(), sana_sprint.SCMScheduler()
    names = {name for name in {*dir(published), *vars(published)} if not name.startswith("_")}
    assert {name for name in names if not hasattr(ours, name)} == NOT_OF_THE_SCHEDULER


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_name_says_why(folder, name):
    for owner in (OURS, quiet(sana_sprint, folder)):
        with pytest.raises(AttributeError, match=f"SanaSprintPipeline has no {name}: .{{20}}"):
            getattr(owner, name)


@pytest.mark.parametrize(
    "name",
    [
        "__call__",
        "enable_attention_slicing",
        "enable_xformers_memory_efficient_attention",
        "encode_prompt",
        "numpy_to_pil",
        "prepare_latents",
        "progress_bar",
        "set_attention_slice",
        "set_use_memory_efficient_attention_xformers",
    ],
)
def test_methods_take_the_published_arguments_in_the_published_order(name):
    published, ours = (inspect.signature(getattr(cls, name)) for cls in (diffusers.SanaSprintPipeline, OURS))
    by_position = [
        parameter.name
        for parameter in ours.parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert by_position == list(published.parameters)


NO_EFFECT = {
    "enable_attention_slicing": (),
    "disable_attention_slicing": (),
    "set_attention_slice": (None,),
    "enable_xformers_memory_efficient_attention": (),
    "disable_xformers_memory_efficient_attention": (),
    "set_use_memory_efficient_attention_xformers": (True,),
}


def test_settings_without_effect_say_so_once(folder, caplog):
    """diffusers raises for xformers where that is not installed."""
    warn_once.cache_clear()
    pipe = quiet(sana_sprint, folder)
    with caplog.at_level(logging.WARNING, logger="sana_sprint"):
        for _ in range(2):
            for name, arguments in NO_EFFECT.items():
                getattr(pipe, name)(*arguments)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("has no effect" in message for message in messages)


def test_a_pipeline_of_the_same_components(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        other = lib.SanaSprintPipeline(**pipe.components, **pipe.parameters)
        return list(other.components), other.vae is pipe.vae, pipe.parameters

    same(run, folder)


def test_progress_bars(folder, capfd):
    def run(lib, folder):
        pipe = lib.SanaSprintPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=False, desc="drawing")
        seen = list(pipe.progress_bar("abc"))
        with pipe.progress_bar(total=2) as bar:
            bar.update()
        return seen, bar.total, bar.desc

    same(run, folder)
    both_refuse(lambda lib, folder: quiet(lib, folder).progress_bar(), folder, match="iterable or total")
