"""Fuzzed requests name items that there are: docs/serving.md has the command.

OpenAPI cannot say which items a catalogue has, so what is made of it alone hardly gets to the
search. Values of another type stay as they are: they have to be refused.
"""

import itertools
import os

import schemathesis

# Items of the run that is served: ids or titles. The filters' differ, so that some item is left.
_ITEMS = os.environ["FUZZ_ITEMS"].split(",")
_OF_FIELD = {
    "history": _ITEMS, "histories": _ITEMS, "candidates": _ITEMS, "compare": _ITEMS,
    "allow": _ITEMS[::2], "deny": _ITEMS[1::2],
}  # fmt: skip
_MOST_ITEMS = int(os.environ.get("FUZZ_MOST_ITEMS", "10"))  # of a list


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict):
        body = {name: _named(value, _OF_FIELD.get(name)) for name, value in case.body.items()}
        if type(body.get("k")) is int and body["k"] > 0:
            body["k"] = 1 + body["k"] % _MOST_ITEMS
        case.body = body


def _named(value, items):
    """A list with items in the place of texts, however deep."""
    names = itertools.cycle(items or ())

    def of(value):
        if isinstance(value, list):
            return [*map(of, value)]
        return next(names) if isinstance(value, str) else value

    return of(value) if items and isinstance(value, list) else value
