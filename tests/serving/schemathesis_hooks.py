"""Fuzzed requests name items that there are: docs/serving.md has the command.

OpenAPI cannot say which items a catalogue has, so what is made of it alone hardly gets to the
search. Values of another type stay as they are: they have to be refused.
"""

import itertools
import os

import schemathesis

# Of the run that is served, ids or titles: two of histories, which may be left out of lists, and
# others that are in them.
_KNOWN = os.environ["FUZZ_ITEMS"].split(",")
_OF_FIELD = {
    "history": _KNOWN[:2], "histories": _KNOWN[:2], "deny": _KNOWN[:2],
    "allow": _KNOWN[2:], "candidates": _KNOWN[2:], "compare": _KNOWN[2:3],
}  # fmt: skip
_MOST_ITEMS = int(os.environ.get("FUZZ_MOST_ITEMS", "10"))  # of a list


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict):
        body = {name: _named(value, _OF_FIELD.get(name)) for name, value in case.body.items()}
        k = body.get("k")
        if type(k) in (int, float) and k > 0 and k % 1 == 0:  # 2.0 is an integer in JSON
            body["k"] = 1 + k % _MOST_ITEMS
        case.body = body


def _named(value, items):
    """A list with items in the place of texts, however deep."""
    names = itertools.cycle(items or ())

    def of(value):
        if isinstance(value, list):
            return [*map(of, value)]
        return next(names) if isinstance(value, str) else value

    return of(value) if items and isinstance(value, list) else value
