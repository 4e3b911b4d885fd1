"""The vocabulary of the emoji world: kinds of objects, backgrounds, and the words that captions use for them.

A *kind* is one thing with its own artwork ("cat", "red heart"). `KINDS` maps its name to the emoji that
draws it; `SYNONYMS` lists other words captions use for the same artwork.
"""

from __future__ import annotations

OBJECTS: dict[str, str] = {
    "apple": "🍎",
    "banana": "🍌",
    "orange": "🍊",
    "pizza": "🍕",
    "donut": "🍩",
    "cake": "🎂",
    "carrot": "🥕",
    "broccoli": "🥦",
    "hot dog": "🌭",
    "cat": "🐱",
    "dog": "🐶",
    "horse": "🐴",
    "cow": "🐮",
    "bear": "🐻",
    "elephant": "🐘",
    "sheep": "🐑",
    "zebra": "🦓",
    "giraffe": "🦒",
    "bird": "🐦",
    "fish": "🐟",
    "car": "🚗",
    "bus": "🚌",
    "train": "🚆",
    "truck": "🚚",
    "bicycle": "🚲",
    "boat": "⛵",
    "airplane": "✈️",
    "rocket": "🚀",
    "astronaut": "🧑‍🚀",
    "umbrella": "☂️",
    "clock": "⏰",
    "chair": "🪑",
    "book": "📕",
    "scissors": "✂️",
    "teddy bear": "🧸",
    "fork": "🍴",
    "cup": "☕",
    "laptop": "💻",
    "phone": "📱",
    "tv": "📺",
    "kite": "🪁",
    "ball": "⚽",
    "tree": "🌳",
    "flower": "🌻",
    "star": "⭐",
    "moon": "🌙",
    "egg": "🥚",
    "house": "🏠",
}

SHAPE_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
_SHAPE_EMOJI = {
    "heart": "❤️🧡💛💚💙💜🤎🖤🤍",
    "circle": "🔴🟠🟡🟢🔵🟣🟤⚫⚪",
    "square": "🟥🟧🟨🟩🟦🟪🟫⬛⬜",
}


def _shapes() -> dict[str, str]:
    shapes = {}
    for shape, emoji in _SHAPE_EMOJI.items():
        glyphs = [glyph for glyph in emoji if glyph != "\ufe0f"]
        for color, glyph in zip(SHAPE_COLORS, glyphs, strict=True):
            shapes[f"{color} {shape}"] = glyph
    return shapes


SHAPES: dict[str, str] = _shapes()
KINDS: dict[str, str] = {**OBJECTS, **SHAPES}

# sRGB. Chosen apart from one another, and from the artwork of the shapes of the same colour.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (190, 20, 30),
    "green": (20, 120, 50),
    "blue": (30, 70, 190),
    "yellow": (255, 240, 120),
    "pink": (255, 175, 205),
    "purple": (110, 50, 150),
    "orange": (240, 130, 20),
    "gray": (128, 128, 128),
    "brown": (100, 60, 30),
}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "donut": ("doughnut",),
    "airplane": ("plane",),
    "bicycle": ("bike",),
    "boat": ("sailboat",),
    "tv": ("television",),
    "phone": ("smartphone",),
    "ball": ("football", "soccer ball"),
    "cup": ("cup of coffee",),
    "laptop": ("computer",),
    "book": ("red book",),
    "clock": ("alarm clock",),
    "flower": ("sunflower",),
    "moon": ("crescent moon",),
    "apple": ("red apple",),
    "car": ("red car",),
    "cake": ("birthday cake",),
    "train": ("railway train",),
}

_IRREGULAR_PLURALS = {
    "sheep": "sheep",
    "fish": "fish",
    "broccoli": "broccoli",
    "scissors": "scissors",
    "cup of coffee": "cups of coffee",
    "bus": "buses",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def plural(noun: str) -> str:
    """The plural of a kind's name or synonym: "apple" -> "apples", "fish" -> "fish"."""
    return _IRREGULAR_PLURALS.get(noun, noun + "s")


def with_article(noun: str) -> str:
    """The noun with its article: "an apple", "a pair of scissors" for scissors."""
    if noun == "scissors":
        return "a pair of scissors"
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def clashes(kind: str, background: str) -> bool:
    """Returns True if a kind would be hard to see on a background; no scene combines them."""
    color = kind.split(" ")[0] if kind in SHAPES else ""
    near = {"yellow": ("star", "moon"), "white": ("egg",), "black": (), "orange": ("orange",)}
    return color == background or kind in near.get(background, ())
