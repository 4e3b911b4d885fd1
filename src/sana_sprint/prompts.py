"""Prompt preparation for the text encoder: normalising, cleaning, the instruction, the token window.

Pure text and integers; no tensors. The rules are those of the published SANA-Sprint pipeline, with which the published
weights are used. Intentional differences are stated in the docstrings.
"""

import html
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEFAULT_MAX_SEQUENCE_LENGTH = 300  # text tokens that reach the image model (SANA-Sprint's model_max_length)

# "Complex human instruction" (the SANA paper): put in front of every prompt, it makes the language model dwell
# on the picture. This is the published pipeline's documented default, to the letter.
COMPLEX_HUMAN_INSTRUCTION: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:",
    "User Prompt: ",
)


def join_instruction(instruction: Sequence[str] | None) -> str:
    """Joins the instruction's lines; an empty string, meaning no instruction, for None, an empty sequence and `[""]`.

    Raises:
        ValueError: for a plain string, which would be split into letters.
    """
    if isinstance(instruction, str):
        raise ValueError(
            f"complex_human_instruction must be a sequence of lines, not one string: {instruction!r}"
        )
    return "\n".join(instruction or ())


# ----- the token window -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenWindow:
    """Positions of the tokenised `instruction + prompt` that become embeddings: 0 and `start` to `end` - 1."""

    start: int
    end: int  # also where the tokens are cut off

    def num_kept(self, num_tokens: int) -> int:
        """Window positions that hold one of `num_tokens` real tokens; the others would be padding."""
        return 1 + max(0, min(num_tokens, self.end) - self.start)

    def num_lost(self, num_tokens: int) -> int:
        """Number of `num_tokens` that are cut off."""
        return max(0, num_tokens - self.end)


def token_window(
    max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH, num_instruction_tokens: int | None = None
) -> TokenWindow:
    """The published window: bos and the last `max_sequence_length - 1` positions of the padded sequence.

    With an instruction that is padded to `num_instruction_tokens + max_sequence_length - 2`, so the window
    starts at the instruction's last token (bos counts in both lengths). Without one the window is everything.

    Args:
        max_sequence_length: embeddings per prompt, at least 2.
        num_instruction_tokens: tokens of the instruction alone, bos included; None if there is none.

    Raises:
        ValueError: if either number leaves no room for a prompt.
    """
    if max_sequence_length < 2:
        raise ValueError(f"max_sequence_length must be at least 2 (bos and one token): {max_sequence_length}")
    if num_instruction_tokens is None:
        return TokenWindow(start=1, end=max_sequence_length)
    if num_instruction_tokens < 1:
        raise ValueError(f"the tokenised instruction must hold at least bos: {num_instruction_tokens} tokens")
    return TokenWindow(start=num_instruction_tokens - 1, end=num_instruction_tokens + max_sequence_length - 2)


# ----- normalising and cleaning -----------------------------------------------------------------------------


def normalise_prompt(prompt: str, *, clean: bool = False) -> str:
    """Lower-cases and strips a prompt, as the published pipeline does; `clean` runs `clean_caption` instead.

    Text to be written in the picture loses its case too; the published weights expect that.
    """
    return clean_caption(prompt) if clean else prompt.lower().strip()


def clean_caption(caption: str) -> str:
    """Lower-cases a caption scraped from the web and removes everything that is not description.

    Markup, links, nicknames, file names, article numbers, sizes, shop phrases and stray punctuation are removed; wrongly
    decoded text is repaired. The rules run twice, because one removal can expose a match of another rule.

    The same as the published pipeline's cleaning with two differences: Chinese and Japanese text stays (there
    it is deleted, and a Chinese prompt becomes an empty one), and markup that the HTML parser refuses is kept
    as text (there it raises).

    Raises:
        ImportError: if ftfy or beautifulsoup4 is not installed.
    """
    return _clean_once(_clean_once(caption))


_Rule = tuple[re.Pattern[str], str]


def _rules(*rules: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_SITE = r"[a-z0-9.\-]+\.(?:co|com|edu|gov|it|net|org|ru)[\w/-]*\b/?(?!@)"
_FILE_TYPE = "(?:apk|bmp|eps|jpeg|jpg|mp4|pdf|png|webp)"
# Unicode's dash punctuation (category Pd).
_DASH = (
    "[\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u2e5d"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d\U00010ead]"
)
_SYMBOL = "[" + re.escape("#®•©™&@·º½¾¿¡§~()[]{}|\\/*") + "]"

# Order matters throughout: each rule sees the output of those before it.
_BEFORE_MARKUP = _rules(
    ("<person>", "person"),  # an anonymiser's placeholder, not a tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
_BEFORE_REPAIR = _rules(
    (r"@\w+\b", ""),  # nicknames
    (rf"{_DASH}+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),  # entities that were escaped twice
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a line break written out
    (r"#(?:\d{1,3}|\d{5,})\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILE_TYPE}", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"{_SYMBOL}+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER_REPAIR = _rules(
    (r"\b(?:[a-zA-Z]{1,3}\d{3,15}|[a-zA-Z]+\d+[a-zA-Z]+|\d+[a-zA-Z]+\d+)\b", ""),  # article codes
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_TYPE}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # longer codes
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # 30x40; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"'](?s:(.+))[\"']$", r"\1"),  # quotes around everything
    ("^['_,\\-:;]", ""),
    ("['_,\\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _clean_once(caption: str) -> str:
    caption = urllib.parse.unquote_plus(caption).strip().lower()
    caption = _apply(_BEFORE_MARKUP, caption)
    caption = _apply(_BEFORE_REPAIR, _without_markup(caption))
    if len(re.findall("[-_]", caption)) > 3:  # this-is-a-file-name-style caption
        caption = re.sub("[-_]", " ", caption)
    caption = html.unescape(html.unescape(_repaired(caption)))
    return _apply(_AFTER_REPAIR, caption).strip()


def _apply(rules: Iterable[_Rule], caption: str) -> str:
    for pattern, replacement in rules:
        caption = pattern.sub(replacement, caption)
    return caption


def _without_markup(caption: str) -> str:
    try:
        from bs4 import BeautifulSoup
        from bs4.builder import ParserRejectedMarkup
    except ImportError as error:
        raise _missing_library("beautifulsoup4") from error
    try:
        # The line break keeps the parser from warning that a bare link or file name is no markup.
        return BeautifulSoup("\n" + caption, "html.parser").text.removeprefix("\n")
    except ParserRejectedMarkup:
        return caption


def _repaired(caption: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise _missing_library("ftfy") from error
    return ftfy.fix_text(caption)


def _missing_library(name: str) -> ImportError:
    return ImportError(f"cleaning captions needs {name}: pip install 'sana-sprint[caption]'", name=name)
