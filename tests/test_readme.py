"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_trains():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    first = names["train_step"](
        names["jnp"].zeros((2, 4, 12)), names["opt_state"], *names["batch"], alpha=0.1
    )[2]
    assert names["value"] < 0.2 * first
    assert names["train_step"]._cache_size() <= 2  # alpha: a weak-typed scalar, traced
