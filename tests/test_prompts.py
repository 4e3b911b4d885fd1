"""Prompt normalising, caption cleaning and the token window, against the published pipeline."""

import inspect
import subprocess
import sys
import unicodedata
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_sprint.prompts import (
    COMPLEX_HUMAN_INSTRUCTION,
    DEFAULT_MAX_SEQUENCE_LENGTH,
    clean_caption,
    join_instruction,
    normalise_prompt,
    token_window,
)


@pytest.fixture(scope="module")
def published():
    from diffusers import SanaSprintPipeline

    return SanaSprintPipeline(None, None, vae=None, transformer=None, scheduler=None)


def published_cleaning(published, caption: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parser's, about captions that look like links or file names
        return published._text_preprocessing(caption, clean_caption=True)[0]


# ----- the instruction --------------------------------------------------------------------------------------


def test_the_instruction_and_the_length_are_the_published_defaults(published):
    parameters = inspect.signature(type(published).__call__).parameters
    assert list(COMPLEX_HUMAN_INSTRUCTION) == parameters["complex_human_instruction"].default
    assert parameters["max_sequence_length"].default == DEFAULT_MAX_SEQUENCE_LENGTH


def test_the_instruction_is_joined_by_line_breaks():
    assert join_instruction(("a:", "b: ")) == "a:\nb: "
    assert join_instruction(None) == join_instruction(()) == join_instruction([""]) == ""
    with pytest.raises(ValueError, match="'Describe'"):
        join_instruction("Describe")


# ----- normalising and cleaning -----------------------------------------------------------------------------

# Each line has work for at least one rule, and is left alone by none.
CAPTIONS = [
    "  A Cat On The Moon ",
    "a+cat%20on%2Fthe moon",
    "<person> with <b>bold</b> hair &amp; a hat &quot;here&quot;",
    "&amp;quot;hello&amp;quot; &amp;amp more",
    "see https://www.example.com/a/b?c=d for a dog",
    "see http://example.xyz/page, www:foo and www.shop.co/it or mail.example.org!",
    "photo by @some_one99 in rome",
    "em\u2014dash, en\u2013dash \u2212 minus, wave\u301cdash",
    "\u00abquoted\u00bb \u201ctext\u201d with \u2018single\u2019 \u00b4marks\u00a8",
    "server 192.168.1.254 in the rain",
    "match 3:45  ",
    "two\\nlines",
    "#12 of #12345 and 1234567 birds, #1234 stays",
    "img_2034.jpg a fox.png file",
    "'''very\"\"loud''' wait.... what",
    "***sale*** [cat] {dog} a|b \\ c / d \u00ae \u2122 ~ \u00bd",
    "end . of . line",
    "this-is-my-cute-cat",
    "well-known up-to-date",
    "snake_case_cat_photo_here",
    "jc6640 jc6640vc 6640vc231 j2d1a2a3 4k tv",
    "vase worldwide free shipping, free download free, download",
    "click for details, click on here",
    "sunset png images, jpeg image, webp",
    "page 12 of a book",
    "30x40 cm, 30.5\u00d740.5, 10\u044520",
    "title : a cat ,dog.bird/fish",
    '"everything quoted"',
    "'single'",
    ":starts and ends-",
    ".hidden",
    "The Mona Lisa doesn\u00e2\u20ac\u2122t have eyebrows \u00fcnter",
    "caf\u00e9 na\u00efve \u043a\u043e\u0448\u043a\u0430",
    "https://only-a-link.com/x",
    "photo.jpg",
    "&#65;&#66;c &lt;i&gt;tag&lt;/i&gt;",
    "",
    "   ",
]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_cleaning_equals_the_published_one(published, caption):
    assert clean_caption(caption) == published_cleaning(published, caption)


PIECES = st.sampled_from(
    [
        *"aZz 09.-_,:;'\"#@&%+/()[]<>x\u00d7\u2014\u00e9\n\\",
        *[
            "12",
            "345",
            "67890",
            "cat",
            "com",
            ".jpg",
            "png",
            "http://",
            "www:",
            "a.com",
            "&amp",
            "&quot;",
            "<b>",
            "shipping",
        ],
        *[
            "free ",
            "download",
            "page ",
            "click on ",
            "image",
            "\\n",
            "@bob",
            "abc123",
            "1.2.3.4",
            " : ",
            " . ",
            "...",
            "- ",
        ],
    ]
)


@given(st.lists(PIECES, max_size=14).map("".join))
@settings(max_examples=300, deadline=None)
def test_cleaning_equals_the_published_one_for_any_caption(caption):
    from diffusers import SanaSprintPipeline

    pipeline = SanaSprintPipeline(None, None, vae=None, transformer=None, scheduler=None)
    assert clean_caption(caption) == published_cleaning(pipeline, caption)


def test_cleaning_keeps_chinese_japanese_and_korean(published):
    for caption in ("一只猫在月球上", "月の上の猫、カタカナ ㇰ", "달 위의 고양이", "㈱ ㍿ 㐀"):
        assert clean_caption(caption) == caption
    assert published_cleaning(published, "一只猫在月球上") == ""  # the documented difference


def test_cleaning_keeps_text_that_the_parser_refuses():
    assert "cat" in clean_caption("a cat <![foo[ on the moon")


def test_every_dash_becomes_a_hyphen():
    dashes = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) == "Pd"]
    for dash in dashes:
        # All that Python's Unicode tables know; a newer Unicode may bring one more for the rule.
        assert clean_caption(f"up{dash}{dash}to") == "up-to", f"U+{ord(dash):04X}"


@pytest.mark.parametrize(("module", "package"), [("ftfy", "ftfy"), ("bs4", "beautifulsoup4")])
def test_cleaning_without_its_libraries_says_what_to_install(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'sana-sprint\[caption\]'"):
        clean_caption("a cat")


def test_default_normalising_is_lower_case_without_outer_blanks(published):
    for caption in CAPTIONS:
        assert normalise_prompt(caption) == caption.lower().strip()
        assert normalise_prompt(caption) == published._text_preprocessing(caption)[0]
    assert normalise_prompt("<b>A Cat</b>", clean=True) == "a cat"


# ----- the token window -------------------------------------------------------------------------------------


def published_positions(length: int, num_instruction: int | None) -> list[int]:
    total = length if num_instruction is None else num_instruction + length - 2
    return [range(total)[i] for i in (0, *range(-length + 1, 0))]


@pytest.mark.parametrize("length", [2, 3, 17, 300])
@pytest.mark.parametrize("num_instruction", [None, 1, 2, 23, 232])
def test_the_window_is_bos_and_the_last_positions(length, num_instruction):
    window = token_window(length, num_instruction)
    positions = published_positions(length, num_instruction)
    assert [0, *range(window.start, window.end)] == positions
    for num_tokens in range(1, window.end + 5):
        assert window.num_lost(num_tokens) == len(range(num_tokens)[window.end :])
        assert window.num_kept(num_tokens) == sum(position < num_tokens for position in positions)


@pytest.mark.parametrize(("length", "num_instruction"), [(1, None), (0, 5), (-3, 5)])
def test_a_window_needs_room_for_a_token(length, num_instruction):
    with pytest.raises(ValueError, match=f"at least 2 .*: {length}"):
        token_window(length, num_instruction)


def test_an_instruction_has_at_least_bos():
    with pytest.raises(ValueError, match="0 tokens"):
        token_window(300, 0)


def test_importing_the_module_imports_none_of_the_heavy_libraries():
    heavy = {"torch", "transformers", "ftfy", "bs4"}
    code = f"import sys, sana_sprint.prompts; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
