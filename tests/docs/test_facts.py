"""What the pages say of files, configs and lists is so."""

import re

import numpy as np
import pages
import pyarrow.parquet

from tca4rec_jax.cf.logits_export import export_parquet
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import default_config
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData


def test_exported_cf_logits_have_the_columns_that_the_page_says(tmp_path):
    rows = ItemSequences(np.arange(2), np.array([0, 1, 2, 0]), np.array([0, 2, 4]), np.arange(4))
    data = RecData(Catalogue(("a", "b", "c"), ("A", "B", "C")), dict.fromkeys(SPLITS, rows))
    cf = default_config().cf
    cf.model = "popularity"
    run_cf(cf, data, tmp_path, history_length=2)
    export_parquet(tmp_path / "out", [str(tmp_path / "cf" / "logits")], data, SPLITS)
    page = (pages.ROOT / "docs" / "cf_models.md").read_text()
    _, _, table = page.partition("| split | events | columns |\n| --- | --- | --- |\n")
    said = {}
    for line in table.partition("\n\n")[0].splitlines():
        splits, _, columns = map(pages.quoted, line.strip("|").split("|"))
        said |= dict.fromkeys(splits, columns)
    assert {*said} == {*SPLITS}
    for split, columns in said.items():
        written = pyarrow.parquet.read_schema(tmp_path / "out" / f"{split}.parquet")
        assert written.names == columns, split


def test_a_config_that_was_never_run_is_marked_as_such():
    """In a row that ends with 'not yet'; the docstring of the config says it, too."""
    marked = set()
    for page in ("recommenders", "official"):
        text = (pages.ROOT / "docs" / f"{page}.md").read_text()
        rows = re.findall(r"^\| .*\| not yet \|$", text, re.MULTILINE)
        named = [name for row in rows for name in pages.quoted(row)]
        marked |= {name for name in named if name.startswith("configs/")}
    never = {
        str(path.relative_to(pages.ROOT))
        for path in (pages.ROOT / "configs").rglob("*.py")
        if "not run yet" in path.read_text()
    }
    assert never
    assert marked == never
