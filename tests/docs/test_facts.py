"""What the pages say of files, configs and lists is so."""

import re
import tomllib

import numpy as np
import pages
import pyarrow.parquet

from tca4rec_jax.cf.logits_export import export_parquet
from tca4rec_jax.cf.pipeline import run_cf
from tca4rec_jax.config import default_config
from tca4rec_jax.data.catalogue import Catalogue
from tca4rec_jax.data.sequences import SPLITS, ItemSequences, RecData

PROJECT = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]


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


def test_the_first_page_of_the_site_leads_to_every_other():
    linked = {*pages.links((pages.ROOT / "docs" / "index.md").read_text())}
    others = {page.name for page in pages.PAGES[1:]} - {"index.md"}
    assert others <= linked


def test_contributing_names_every_folder_of_the_package_and_every_extra():
    named = {*pages.quoted((pages.ROOT / "docs" / "contributing.md").read_text())}
    folders = {path.parent.name for path in (pages.ROOT / "tca4rec_jax").glob("*/__init__.py")}
    extras = {*PROJECT["optional-dependencies"]}
    assert "core" in folders
    assert folders | extras <= named


def test_every_script_of_a_job_is_in_the_row_of_what_it_does_there():
    """docs/training.md, by what the script tells `launch`."""
    text = (pages.ROOT / "docs" / "training.md").read_text()
    kinds = {"all_processes": "all work", "main_process": "the first works", "": "want a process"}
    rows = {kind: re.findall(rf"^\| (.+) \| {said}", text, re.M) for kind, said in kinds.items()}
    found = {kind: pages.quoted(row) for kind, (row,) in rows.items()}
    for path in (pages.ROOT / "launch").glob("*.py"):
        if re.search(r"^    launch\(", source := path.read_text(), re.MULTILINE):
            kind = re.search(r'run_on="(\w+)"', source)
            assert path.name in found[kind[1] if kind else ""], path.name
