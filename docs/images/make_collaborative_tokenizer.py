"""Draws docs/images/collaborative_tokenizer.svg: trie, masses, p_cf and a soft label.

    python docs/images/make_collaborative_tokenizer.py

The numbers are computed here from the CF logits below, by the definitions in docs/method.md.
"""

import math
from pathlib import Path

PICTURE = Path(__file__).with_name("collaborative_tokenizer.svg")
WIDTH, HEIGHT = 900, 330
ALPHA = 0.4
TARGET = "Star Trek"
CF_LOGITS = {"Star Wars": 1.5, "Star Trek": 0.5, "Toy Story": 1.0, "Toy Soldiers": -1.0}
INK, GREY, BLUE, ORANGE, GREEN = "#1f2937", "#9ca3af", "#2563eb", "#ea7317", "#15803d"

MASS = {title: math.exp(logit) for title, logit in CF_LOGITS.items()}


def mass(prefix: str) -> float:
    """M(n) of the node of a prefix."""
    return sum(m for title, m in MASS.items() if title.startswith(prefix))


def text(x, y, words, *, size=14, colour=INK, anchor="start", weight="normal") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{words}</text>'
    )


def line(x1, y1, x2, y2, colour=GREY, width=1.5) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>'
    )


def bar(x, y, length, colour) -> str:
    return f'<rect x="{x}" y="{y}" width="{length:.1f}" height="16" rx="2" fill="{colour}"/>'


def node(x, y, label, prefix, *, below=False, colour=INK) -> list[str]:
    at_label, at_mass = (y + 42, y + 24) if below else (y - 30, y - 13)
    return [
        f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>',
        text(x - 6, at_label, label, anchor="middle", weight="bold", colour=colour),
        text(x - 6, at_mass, f"M = {mass(prefix):.2f}", size=12, anchor="middle"),
    ]


def trie() -> list[str]:
    root, inner = (50, 180), {"Star": (170, 115), "Toy": (170, 245)}
    leaf_y = dict(zip(CF_LOGITS, (85, 145, 215, 275), strict=True))
    parts = [text(30, 32, "1  titles as a trie, CF mass of every node", weight="bold")]
    for first, at in inner.items():
        parts.append(line(*root, *at))
        for title, y in leaf_y.items():
            if title.startswith(first):
                parts.append(line(*at, 290, y))
    parts += node(*root, "", "")
    for first, at in inner.items():
        star = first == "Star"
        parts += node(*at, first, first, below=not star, colour=BLUE if star else INK)
    for title, y in leaf_y.items():
        second = title.split()[1]
        parts.append(f'<circle cx="290" cy="{y}" r="5" fill="{INK}"/>')
        parts.append(text(302, y + 5, second, weight="bold"))
        parts.append(
            text(375, y + 5, f"s = {CF_LOGITS[title]:+.1f}, M = {MASS[title]:.2f}", size=12)
        )
    return parts


def distributions() -> list[str]:
    x, scale = 640, 150
    children = {title: MASS[title] / mass("Star") for title in MASS if title.startswith("Star")}
    rows = (
        ("2  p_cf(v | Star) = M(child) / M(Star)", ORANGE, lambda title: children[title], 32),
        (f"target: {TARGET}", GREY, lambda title: float(title == TARGET), 132),
        (
            f"3  soft label: {1 - ALPHA:.1f} x target + {ALPHA:.1f} x p_cf",
            GREEN,
            lambda title: (1 - ALPHA) * (title == TARGET) + ALPHA * children[title],
            232,
        ),
    )
    parts = []
    for heading, colour, value, y in rows:
        parts.append(text(560, y, heading, weight="bold"))
        for offset, title in zip((14, 38), children, strict=True):
            parts.append(text(x - 10, y + offset + 13, title.split()[1], anchor="end"))
            parts.append(bar(x, y + offset, max(scale * value(title), 1), colour))
            at = x + scale * value(title) + 8
            parts.append(text(round(at), y + offset + 13, f"{value(title):.2f}", size=12))
    parts.append(text(560, 316, "The LLM learns it as the next token after “Star”.", size=12))
    return parts


def picture() -> str:
    """The whole file."""
    body = "\n".join([*trie(), *distributions(), line(530, 20, 530, 310, "#e5e7eb")])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" role="img">\n'
        "<title>From CF scores of items to a soft label of tokens</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
