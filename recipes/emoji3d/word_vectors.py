"""Starts a teacher from pretrained word vectors: `python -m recipes.emoji3d.word_vectors runs/emoji3d/128/words`.

WordLlama's table (`pip install wordllama`, MIT) has a vector for each of Llama 2's 32,000 tokens, such that sums of them
say how near two texts are in meaning. A text encoder whose embedding starts from it may draw a word that training never
had, if it stays near the words that it had. `--measure` says how often that is so before any training.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from recipes.emoji3d.concepts import Concept, Noun, concepts
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.models.text_encoder import make_text_encoder, save_text
from sana_sprint.train.stages.teacher import initialise
from sana_sprint.weights import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TABLE = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_STD = 0.02  # of Gemma's embeddings, before they are multiplied by the root of their width


def package_file(name: str) -> Path:
    """A file of the wordllama package. Raises ImportError if it is not installed."""
    spec = find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise ImportError("word vectors need wordllama: pip install wordllama==0.4.0.post1", name="wordllama")
    return Path(spec.origin).parent / name


def make_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a tokenizers file, which lower-cases and puts bos first."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = wrap(
        tokenizer_object=tokenizer, pad_token="<unk>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return wrapped


def embedding(table: Tensor, width: int) -> Tensor:
    """The table (V,N) as an embedding (V,width) of the usual size, N at most `width`: a rotation, which keeps all angles.

    Raises:
        ValueError: the table is wider.
    """
    if table.shape[1] > width:
        raise ValueError(f"a table of {table.shape[1]} columns does not fit into {width}")
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    rotated = table.float() @ rotation[: table.shape[1]]
    return rotated * (_STD / rotated.std())


def write_start(recipe: Path, folder: Path) -> None:
    """Writes tokenizer, text encoder and transformer that a teacher may start from, of the sizes in a teacher's recipe."""
    settings = tomllib.loads(recipe.read_text(encoding="utf-8"))
    tokenizer = make_tokenizer(package_file(_TOKENIZER))
    table = load_file(package_file(_TABLE))["embedding.weight"]
    torch.manual_seed(0)
    text_encoder = make_text_encoder(len(table), settings["text_encoder"])
    with torch.no_grad():
        text_encoder.embed_tokens.weight.copy_(embedding(table, text_encoder.config.hidden_size))
    transformer = SanaTransformer2DModel(TransformerConfig.from_dict(settings["model"]))
    initialise(transformer)
    save_text(tokenizer, text_encoder, folder)
    save_model(transformer, folder / "transformer")


def retrieval(
    tokenizer: PreTrainedTokenizerBase, table: Tensor, things: Sequence[Concept], *, sharing: bool = True
) -> float:
    """The part of held-out nouns whose nearest known noun, by the cosine of mean vectors, is of their own concept.

    Args:
        tokenizer: of the nouns.
        table: a vector for each token (V,N).
        things: whose nouns.
        sharing: of all held-out nouns (True), or only of those that share no token with their concept's known ones.
    """

    def tokens(noun: Noun) -> list[int]:
        found: list[int] = tokenizer(noun.text, add_special_tokens=False)["input_ids"]
        return found

    def vectors(nouns: Sequence[Noun]) -> Tensor:
        means = torch.stack([table[tokens(noun)].float().mean(0) for noun in nouns])
        return torch.nn.functional.normalize(means, dim=1)

    known = [(noun, number) for number, concept in enumerate(things) for noun in concept.nouns]
    unseen = [
        (noun, number)
        for number, concept in enumerate(things)
        for noun in concept.unseen_nouns
        if sharing or not {*tokens(noun)} & {token for each in concept.nouns for token in tokens(each)}
    ]
    nearest = (vectors([noun for noun, _ in unseen]) @ vectors([noun for noun, _ in known]).T).argmax(1)
    owners = torch.tensor([number for _, number in known])[nearest]
    return float((owners == torch.tensor([number for _, number in unseen])).float().mean())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="receives the models to start from")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("teacher-128.toml"))
    parser.add_argument("--measure", action="store_true", help="how near held-out words are to their things")
    arguments = parser.parse_args()
    if arguments.folder:
        write_start(arguments.recipe, arguments.folder)
    if arguments.measure:
        table = load_file(package_file(_TABLE))["embedding.weight"]
        tokenizer = make_tokenizer(package_file(_TOKENIZER))
        mixed = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
        for tier in ("everyday", "all"):
            for sharing, which in ((True, "held-out words"), (False, "those that share no token with it")):
                parts = [
                    retrieval(tokenizer, each, concepts(tier), sharing=sharing) for each in (table, mixed)
                ]
                print(
                    f"{tier}: {parts[0]:.1%} of {which} are nearest to their own thing, "
                    f"{parts[1]:.1%} with random vectors"
                )


if __name__ == "__main__":
    main()
