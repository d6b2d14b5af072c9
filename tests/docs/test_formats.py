"""The columns of files are those that the pages say."""

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
