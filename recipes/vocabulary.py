"""Writes the words of a source's captions into a model's folder: `python -m recipes.vocabulary SOURCE FOLDER`.

The model can then say which words of a prompt it was not taught. SOURCE is a function of samples with captions, such as
recipes.emoji.scenes:training_scene, or a stored set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sana_sprint.train.data import open_source
from sana_sprint.vocabulary import Vocabulary


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="as data.source in a recipe")
    parser.add_argument("folder", type=Path, help="of the model")
    parser.add_argument(
        "--count", type=int, default=20_000, help="samples whose captions are read (default: 20000)"
    )
    arguments = parser.parse_args()
    source = open_source(arguments.source)
    positions = source.training[: arguments.count]
    vocabulary = Vocabulary.of(caption for position in positions for caption in source.sample(position)[1])
    vocabulary.write(arguments.folder)
    print(f"{len(vocabulary.words)} words in {arguments.folder}")


if __name__ == "__main__":
    main()
