"""Grids: their arguments, cells, configs and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from tca4rec_jax.errors import UserError
from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.results import CF, POPULAR, Cell

CONFIGS = Path(__file__).parents[2] / "configs" / "experiments"
GRIDS = sorted(CONFIGS.glob("*.py"))


def cells_of(argument="", name="tiny"):
    return Cells(load_grid(f"{CONFIGS / name}.py:{argument}"), Path("W"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("argument", ["", "debug"])
def test_every_grid_has_valid_configs(path, argument):
    cells = cells_of(argument, path.stem)
    cells.check()
    of_model = {(cell.data, cell.recommender, cell.cf): cell for cell in cells.all}
    for cell in of_model.values():
        config = cells.config_of(cell)
        assert (config.llm.num_layers == 2) == bool(argument)
        assert (config.evaluation.rows == 8) == bool(argument)


@pytest.mark.parametrize("name", ["claim", "alpha_curve"])
def test_runs_are_validated_ten_times_at_every_budget(name):
    cells = cells_of("seed=0", name)
    llm = [cells.config_of(cell) for cell in cells.all if cell.is_llm]
    assert {config.training.steps / config.validation.every for config in llm} == {10}


def test_cells_that_do_not_depend_on_an_axis_are_one():
    cells = cells_of("seed=0,form=('cross_entropy','log_expectation'),beta=(1,2)").all
    llm = [cell for cell in cells if cell.is_llm]
    plain = [cell for cell in llm if not cell.alpha]
    alone = {"alpha": 0.0, "tau": 1.0, "softmax": "children", "seed": 0, "steps": 6}
    assert Cell("movielens", "ids", **alone, guidance=0.0) in plain
    # guided: two CF models x two betas, whatever the form
    assert len(plain) == 1 + 2 * 2
    # two CF models x two alphas x two forms x two betas x two guidances
    assert len(llm) - len(plain) == 32
    assert [cell for cell in cells if not cell.is_llm] == [
        Cell("movielens", POPULAR),
        Cell("movielens", CF, "popularity"),
        Cell("movielens", CF, "bpr_mf", 0),
    ]


def test_a_run_is_shared_by_guidances_and_at_alpha_0_by_cf_models():
    cells = cells_of("seed=0")
    runs = {}
    for cell in cells.all:
        if cell.is_llm:
            runs.setdefault(cells.run_name(cell), []).append((cell.cf, cell.alpha, cell.guidance))
    assert sorted(runs.values(), key=len) == [
        *(
            [(cf, alpha, 0.0), (cf, alpha, 1.0)]
            for cf in ("popularity", "bpr_mf")
            for alpha in (0.3, 0.9)
        ),
        [(None, 0.0, 0.0), ("popularity", 0.0, 1.0), ("bpr_mf", 0.0, 1.0)],
    ]


def test_a_cell_has_its_config():
    cells = cells_of("ids.training.batch_size=2,movielens.evaluation.rows=7,bpr_mf.cf.batch_size=9")
    cell = next(
        c for c in cells.all if (c.cf, c.alpha, c.guidance, c.seed) == ("bpr_mf", 0.3, 1.0, 1)
    )
    config = cells.config_of(cell)
    assert (config.objective.alpha, config.seed, config.cf.model) == (0.3, 1, "bpr_mf")
    assert (config.training.batch_size, config.evaluation.rows, config.cf.batch_size) == (2, 7, 9)
    assert config.cf.logits == "W/movielens/cf/bpr_mf_0/cf/logits"
    assert config.ids.item_vectors == "W/movielens/cf/bpr_mf_0/item_vectors.npy"
    assert config.data.source == "movielens_100k"
    assert config.decoding.beta == config.objective.beta == 1.0


def test_a_recommender_has_its_ids_on_one_data_set_alone():
    cells = cells_of(
        "ids.on.beauty.ids.path=Beauty.index.json,ids.on.office.llm.dropout=0.5", "claim"
    )
    found = {cell.data: cells.config_of(cell) for cell in cells.all if cell.recommender == "ids"}
    assert {data: config.ids.path for data, config in found.items()} == {
        "movielens": None,
        "beauty": "Beauty.index.json",
        "office": None,
    }
    assert (found["office"].llm.dropout, found["office"].training.steps) == (0.5, 1200)
    tiny = cells_of("ids.on.movielens.training.batch_size=2,bpr_mf.on.movielens.cf.batch_size=9")
    config = tiny.config_of(next(cell for cell in tiny.all if cell.cf == "bpr_mf" and cell.is_llm))
    assert (config.training.batch_size, config.cf.batch_size) == (2, 9)


def test_values_of_an_axis_on_some_data_are_those_of_no_other():
    def betas(grid):
        cells = Cells(grid, Path("W"))
        return {(c.data, c.recommender, c.beta) for c in cells.all if c.alpha and c.cf == "sasrec"}

    grid = load_grid(f"{CONFIGS / 'claim'}.py:data=(movielens,beauty),seed=0,alpha=0.5")
    names = {"titles", "llara", "ids"}
    on_movielens = {("movielens", name, 1.0) for name in names}
    assert betas(grid) == {*on_movielens, ("beauty", "ids", 1.4)}
    ids = dataclasses.replace(grid.recommenders["ids"], axes={"beta": {"movielens": (3, 4)}})
    own = dataclasses.replace(
        grid,
        cf={"sasrec": dataclasses.replace(grid.cf["sasrec"], axes={})},
        recommenders=grid.recommenders | {"ids": ids},
        axes=grid.axes | {"beta": (2,)},
    )
    assert betas(own) == {
        *((data, name, 2.0) for data, name in (("movielens", "titles"), ("movielens", "llara"))),
        *(("movielens", "ids", beta) for beta in (3.0, 4.0)),
        ("beauty", "ids", 2.0),
    }


@pytest.mark.parametrize("debug", ["", "debug,"])
def test_a_field_on_some_data_holds_beside_that_on_all(debug):
    cells = cells_of(
        f"{debug}ids.on.office.training.steps=1,ids.training.steps=5,"
        "ids.on.office.training.steps=9,sasrec.cf.batch_size=3,sasrec.on.office.cf.batch_size=4",
        "claim",
    )
    found = {
        cell.data: cells.config_of(cell)
        for cell in cells.all
        if cell.recommender == "ids" and cell.cf == "sasrec"
    }
    assert {data: config.training.steps for data, config in found.items()} == {
        "movielens": 5,
        "beauty": 5,
        "office": 9,
    }
    assert found["office"].cf.batch_size == 4
    assert found["movielens"].cf.batch_size == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ids.on.books.ids.path=x", "data is 'books': expected one of 'movielens'"),
        ("ids.on.movielens.ids.pathz=x", "config argument 'ids.pathz=x': expected"),
        ("ids.on.movielens.training.steps=x", "config argument 'training.steps=x'"),
        ("ids.data.path=x", r"recommenders\['ids'\] of the grid sets data.path"),
        ("ids.on.movielens=x", "data is 'movielens=x': expected one of 'movielens'"),
        ("ids.on.movielens.data.path=x", r"recommenders\['ids'\] of the grid sets data.path"),
        ("movielens.on.movielens.seed=1", "config argument 'on.movielens.seed=1': expected"),
        ("alpha=2", "objective.alpha is 2.0: expected 0 to 1"),
        ("colour=3", "expected debug, seed, cf_seed, .*, guidance, data, cf or recommender "),
        ("recomender=ids", "did you mean recommender\\?"),
        ("alpha", "grid argument 'alpha': expected"),
        ("cf=ease", "grid argument cf is 'ease': expected one of 'popularity', 'bpr_mf'"),
        ("ids.training.stepz=3", "ids of the grid: config argument"),
        ("form=other", "objective.form is 'other': expected"),
    ],
)
def test_what_is_wrong_is_said(argument, message):
    def configs():
        cells = cells_of(argument)
        return [cells.config_of(cell) for cell in cells.all]

    with pytest.raises(UserError, match=message):
        configs()


def test_a_file_that_is_no_grid_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_grid(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="defines no get_grid"):
        load_grid(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("llara.training.targets=all", "movielens, llara: prompt.templates has several: set"),
        (
            "llara.training.targets=all,llara.prompt.templates=('{history}{target}',),"
            "llara.prompt.separator=''",
            "prompt.item and prompt.separator do not begin with prompt.target and prompt.end",
        ),
        ("titles.prompt.tokenised=whole", "prompt.tokenised is 'whole'"),
        (
            r"titles.prompt.templates=('{history}\n\n{target}',)",
            "text between {history} and {target} is not prompt.separator",
        ),
        ("cf_seed=(0,1)", "seed and cf_seed of the grid have several .*: give one cf_seed"),
    ],
)
def test_what_training_would_refuse_is_refused_before(argument, message):
    with pytest.raises(UserError, match=message):
        cells_of(f"{argument},data=movielens,cf=sasrec", "claim").check()


def test_recommenders_that_make_different_ids_of_one_data_set_are_refused():
    grid = load_grid(f"{CONFIGS}/tiny.py:cf=bpr_mf")
    one = grid.recommenders["ids"]
    other = dataclasses.replace(one, settings={**one.settings, "ids.codes": (8, 8)})
    two = dataclasses.replace(grid, recommenders={"ids": one, "others": other})
    with pytest.raises(UserError, match="make different semantic ids of movielens"):
        Cells(two, Path("W")).check()


@pytest.mark.parametrize(
    ("name", "metric"), [("metric", "ndcg@7"), ("guided_metric", "nll per title")]
)
def test_a_metric_that_is_not_measured_is_refused(name, metric):
    """Of guided lists that is the NLL: guidance would never be chosen."""
    grid = load_grid(f"{CONFIGS}/tiny.py")
    Cells(dataclasses.replace(grid, metric="nll per title"), Path("W")).check()
    with pytest.raises(UserError, match=f"^{name} of the grid, on movielens, is '{metric}': exp"):
        Cells(dataclasses.replace(grid, **{name: metric}), Path("W")).check()
