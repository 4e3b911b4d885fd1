"""Requests for quantisation, in the words of other libraries too."""

from types import SimpleNamespace

import pytest

from sana_sprint.quantize import parse_request
from tests.helpers.quantize import COMPONENTS


def torchao(name):
    return SimpleNamespace(quant_type=type(name, (), {})())


def test_published_objects_are_understood():
    from transformers import BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    both = {"transformer": "int8-weights", "text_encoder": "int8-weights"}
    assert parse_request(None, COMPONENTS) == {}
    assert parse_request(eight, COMPONENTS) == both
    assert parse_request({"text_encoder": eight, "transformer": four, "vae": None}, COMPONENTS) == {
        "text_encoder": "int8-weights",
        "transformer": "nf4",
    }
    assert (
        parse_request(torchao("Int8DynamicActivationInt8WeightConfig"), COMPONENTS)["transformer"] == "int8"
    )


def test_diffusers_pipeline_configs_are_understood():
    from diffusers.quantizers import PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig

    backend = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        components_to_quantize=["transformer"],
    )
    assert parse_request(backend, COMPONENTS) == {"transformer": "nf4"}
    mapping = PipelineQuantizationConfig(
        quant_mapping={"text_encoder": BitsAndBytesConfig(load_in_8bit=True)}
    )
    assert parse_request(mapping, COMPONENTS) == {"text_encoder": "int8-weights"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("int7", "no such quantisation: 'int7'; allowed: int8, "),
        ({"unet": "int8"}, "unknown components: unet"),
        (7, "not a quantisation: int"),
        (torchao("Int4Config"), "no such torchao quant_type here: Int4Config"),
        (SimpleNamespace(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "must be 'nf4', got: 'fp4'"),
        (SimpleNamespace(load_in_8bit=True, llm_int8_skip_modules=["a"]), "excludes layers"),
        (SimpleNamespace(quant_backend="gguf", quant_kwargs={}), "no such quant_backend here: 'gguf'"),
    ],
)
def test_other_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        parse_request(request_, COMPONENTS)
