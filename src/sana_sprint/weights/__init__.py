"""Model folders: config.json + (sharded) safetensors, found by name, read strictly and written atomically.

The layout is the one the published models and diffusers use, in both directions; `V` is a variant such as `fp16`:

    model_index.json                                              of a pipeline: the class of each subfolder
    config.json                                                   `_class_name`, `_diffusers_version`, config fields
    diffusion_pytorch_model[.V].safetensors                       all weights, or
    diffusion_pytorch_model[.V]-00001-of-0000N.safetensors        shards, listed in
    diffusion_pytorch_model.safetensors.index[.V].json            (two older spellings are read too)

A model can also be one file, with its config in the file's metadata (`save_single_file`). Pickles (`.bin`, `.pth`) are never opened.
"""

from sana_sprint.weights.files import CONFIG_NAME, WeightsError, available_variants, first_few
from sana_sprint.weights.hub import download, is_hub_id, resolve_folder
from sana_sprint.weights.index import ModelIndex, read_model_index, write_model_index
from sana_sprint.weights.reading import ModelClass, load_model, load_single_file, open_safetensors
from sana_sprint.weights.writing import save_model, save_single_file

__all__ = [
    "CONFIG_NAME",
    "ModelClass",
    "ModelIndex",
    "WeightsError",
    "available_variants",
    "download",
    "first_few",
    "is_hub_id",
    "load_model",
    "load_single_file",
    "open_safetensors",
    "read_model_index",
    "resolve_folder",
    "save_model",
    "save_single_file",
    "write_model_index",
]
