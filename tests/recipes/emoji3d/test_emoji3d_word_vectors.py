"""A teacher's start from pretrained word vectors, with a small table in the package's place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from recipes.emoji3d import word_vectors
from recipes.emoji3d.concepts import Concept, Noun
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.weights import load_model

WORDS = ("<unk>", "<s>", "</s>", "cat", "pussycat", "dog", "hound", "blue")
RECIPE = """
[text_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
query_pre_attn_scalar = 8
[model]
in_channels = 4
out_channels = 4
num_attention_heads = 2
attention_head_dim = 32
num_layers = 1
num_cross_attention_heads = 2
cross_attention_head_dim = 32
cross_attention_dim = 64
caption_channels = 16
sample_size = 4
qk_norm = "rms_norm_across_heads"
timestep_scale = 0.001
"""


@pytest.fixture
def table() -> torch.Tensor:
    vectors = torch.randn(len(WORDS), 8)
    vectors[4] = vectors[3] + 0.1 * vectors[4]  # pussycat is near cat
    vectors[6] = vectors[5] + 0.1 * vectors[6]  # and hound near dog
    return vectors


@pytest.fixture
def package(tmp_path: Path, table: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wordllama"
    (folder / "weights").mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    save_file({"embedding.weight": table}, folder / "weights/l2_supercat_256.safetensors")
    model = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizers/l2_supercat_tokenizer_config.json"))
    monkeypatch.setattr(word_vectors, "package_file", lambda name: folder / name)
    return folder


@pytest.mark.usefixtures("package")
def test_a_start_has_the_tables_angles_and_all_that_a_teacher_starts_from(
    tmp_path: Path, table: torch.Tensor
) -> None:
    recipe, folder = tmp_path / "teacher.toml", tmp_path / "start"
    recipe.write_text(RECIPE)
    word_vectors.write_start(recipe, folder)
    assert load_tokenizer(folder / "tokenizer")("A Blue cat")["input_ids"] == [1, 0, 7, 3]
    made = load_text_encoder(folder / "text_encoder").embed_tokens.weight.float()
    assert made.shape == (len(WORDS), 16)
    expected = torch.nn.functional.cosine_similarity(table[:, None], table[None], dim=2)
    found = torch.nn.functional.cosine_similarity(made[:, None], made[None], dim=2)
    # Rows of some 0.08 are rounded to fp32: 1e-6 of a cosine.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    transformer = load_model(SanaTransformer2DModel, folder / "transformer")
    assert not transformer.proj_out.weight.any()  # a new one begins at zero


def test_a_table_wider_than_the_text_encoder_is_an_error(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="8 columns does not fit into 4"):
        word_vectors.embedding(table, 4)


def test_retrieval_counts_held_out_words_next_to_their_own_thing(package: Path, table: torch.Tensor) -> None:
    tokenizer = word_vectors.make_tokenizer(package / "tokenizers/l2_supercat_tokenizer_config.json")
    cat, pussycat, dog, hound, blue = (
        Noun(word, "count") for word in ("cat", "pussycat", "dog", "hound", "blue cat")
    )
    things = (Concept("a", (cat,), (pussycat,)), Concept("b", (dog,), (hound,)))
    assert word_vectors.retrieval(tokenizer, table, things) == 1
    crossed = (Concept("a", (cat,), (hound,)), Concept("b", (dog,), (pussycat,)))
    assert word_vectors.retrieval(tokenizer, table, crossed) == 0
    shared = (Concept("a", (cat,), (pussycat, blue)), Concept("b", (dog,), (pussycat,)))
    assert word_vectors.retrieval(tokenizer, table, shared, sharing=False) == 0.5


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_vectors, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wordllama"):
        word_vectors.package_file("weights")
