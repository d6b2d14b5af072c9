"""How the published preprocessing of Amazon's data cleans texts (filter_title in its code).

Titles are cut first, so that an entity such as &amp; may be cut in two. What it cannot use becomes
the 100 printable characters of ASCII, its mark of an item to drop: those marked by their title stay
in the catalogue all the same, those marked by their brand are dropped.
"""

import html
import string

MARKER = string.ascii_letters + string.digits + string.punctuation + string.whitespace
_CHANGED = {
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("‘’´", "'"),
    **dict.fromkeys("–—−", "-"),
    **dict.fromkeys("\n\r\x7f®\xa0ª™¼¢½→©ë¨ν\u3000„³¾\xadº‡", " "),
    "…": "",
    "‚": ",",
    "【": "[",
    "】": "]",
}
_TABLE = str.maketrans(_CHANGED)
_ENTITIES = {"ndash": "-", "lt": "<", "gt": ">", "amp": "&", "quot": '"', "nbsp": " ", "copy": " "}


def published_text(text: str, most: int = 0) -> str:
    """A title or a brand, cut to `most` characters (0: not) and cleaned; or MARKER."""
    text = html.unescape(text[: most or None]).translate(_TABLE)
    for name, character in _ENTITIES.items():  # of what was escaped twice
        text = text.replace(f"&{name};", character)
    while "  " in text:
        text = text.replace("  ", " ")
    text = text.strip()
    if "abcdefg" in text.lower():
        return "unknown title"
    printable = set(text) <= set(string.printable)
    return (
        text if printable and len(text) >= 3 and set(text) & set(string.ascii_letters) else MARKER
    )
