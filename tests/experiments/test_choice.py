"""What is chosen on the validation split, and what is ranked on the test split then."""

import dataclasses
from pathlib import Path

from tca4rec_jax.experiments.cells import Cells
from tca4rec_jax.experiments.choice import wanted
from tca4rec_jax.experiments.grid import load_grid
from tca4rec_jax.experiments.results import TEST, VALIDATION

TINY = Path(__file__).parents[2] / "configs" / "experiments" / "tiny.py"


def cells_of(argument="", **fields):
    grid = load_grid(f"{TINY}:{argument}")
    for name, value in fields.items():
        object.__setattr__(grid, name, value)
    return Cells(grid, Path("W"))


def ranked(cells, score):
    """All that is wanted until nothing new is, each cell scored; and how much was to come."""
    results, to_come = {}, []
    while True:
        found = wanted(cells, results)
        new = [of for of in found.ranked if of not in results]
        if not new:
            return results, [*to_come, found.to_come]
        to_come.append(found.to_come)
        results |= {of: {"ndcg@10": score(*of), "nll per title": -score(*of)} for of in new}


def llm(results, split):
    return [cell for cell, of in results if of == split and cell.is_llm]


def test_alpha_is_chosen_for_each_cf_model_and_only_it_is_tested():
    best = {"popularity": 0.9, "bpr_mf": 0.3}
    cells = cells_of("seed=(0,1,2)")
    results, to_come = ranked(cells, lambda cell, _: float(cell.alpha == best.get(cell.cf)))
    validated = {
        (cell.cf, cell.alpha, cell.seed, cell.guidance) for cell in llm(results, VALIDATION)
    }
    assert validated == {(None, 0.0, 0, 0.0)} | {(cf, a, 0, 0.0) for cf in best for a in (0.3, 0.9)}
    tested = {(cell.cf, cell.alpha, cell.seed, cell.guidance) for cell in llm(results, TEST)}
    seeds, guidances = (0, 1, 2), (0.0, 1.0)
    assert tested == {
        *((cf, alpha, seed, g) for cf, alpha in best.items() for seed in seeds for g in guidances),
        *((None, 0.0, seed, 0.0) for seed in seeds),
        *((cf, 0.0, seed, 1.0) for cf in best for seed in seeds),
    }
    assert to_come == [12, 0, 0]


def test_seeds_of_a_cf_model_share_a_choice():
    """By their mean: the first alone would choose 0.3."""
    cells = cells_of("cf=bpr_mf,seed=0,cf_seed=(0,1),guidance=(0,2)", chosen=("alpha", "guidance"))

    def score(cell, _):
        best = 0.9 if cell.cf_seed == 1 else 0.3
        return float(cell.alpha == best) * (1 + 2 * (cell.cf_seed == 1)) - (cell.guidance or 0.0)

    results, _ = ranked(cells, score)
    tested = {(c.cf_seed, c.alpha, c.guidance) for c in llm(results, TEST) if c.alpha}
    assert tested == {(seed, 0.9, guidance) for seed in (0, 1) for guidance in (0.0, 2.0)}


def test_guidance_is_chosen_with_the_chosen_alpha():
    cells = cells_of("cf=bpr_mf,guidance=(0,1,2,4)", chosen=("alpha", "guidance"))
    results, _ = ranked(cells, lambda cell, _: (cell.alpha or 0) + (cell.guidance == 2))
    tested = {(cell.alpha, cell.guidance) for cell in llm(results, TEST)}
    assert tested == {(0.0, 0.0), (0.0, 2.0), (0.9, 0.0), (0.9, 2.0)}
    guided = {(cell.alpha, cell.guidance, cell.seed) for cell in llm(results, VALIDATION)}
    assert (0.3, 1.0, 0) not in guided
    assert {(0.9, 1.0, 0), (0.9, 2.0, 0), (0.9, 4.0, 0), (0.0, 4.0, 0)} <= guided


def test_the_least_nll_and_the_first_of_equals_are_chosen():
    cells = cells_of("cf=bpr_mf,guidance=0,seed=0", metric="nll per title")
    results, _ = ranked(cells, lambda cell, _: -abs((cell.alpha or 0) - 0.8))
    assert {cell.alpha for cell in llm(results, TEST)} == {0.0, 0.9}
    results, _ = ranked(cells, lambda cell, _: 1.0)
    assert {cell.alpha for cell in llm(results, TEST)} == {0.0, 0.3}


def test_a_slice_without_the_choosing_seed_waits_for_it_and_takes_its_choice():
    """That the other seed's own validation rows would choose 0.3 does not matter."""

    def score(cell, _):
        return float(cell.alpha == (0.9 if cell.seed == 0 else 0.3))

    later = cells_of("cf=bpr_mf,guidance=0,seed=1")
    alone, to_come = ranked(later, score)
    assert {cell.alpha for cell in llm(alone, TEST)} == {0.0}
    assert llm(alone, VALIDATION) == []
    assert to_come[-1] == 1
    first, _ = ranked(cells_of("cf=bpr_mf,guidance=0,seed=0"), score)
    found = wanted(later, first)
    assert {(cell.alpha, cell.seed) for cell in llm(found.ranked, TEST)} == {(0.0, 1), (0.9, 1)}
    assert (llm(found.ranked, VALIDATION), found.to_come) == ([], 0)


def test_a_slice_with_some_of_the_choosing_seeds_waits_for_the_others():
    def score(cell, _):
        return float(cell.alpha == 0.3) + 3 * (cell.seed == 1) * (cell.alpha == 0.9)

    first = cells_of("cf=bpr_mf,guidance=0,seed=0", choose_seeds=(0, 1))
    results, to_come = ranked(first, score)
    assert {cell.seed for cell in llm(results, VALIDATION)} == {0}
    assert ({cell.alpha for cell in llm(results, TEST)}, to_come[-1]) == ({0.0}, 1)
    second = cells_of("cf=bpr_mf,guidance=0,seed=1", choose_seeds=(0, 1))
    results |= {of: {"ndcg@10": score(*of)} for of in wanted(second, results).ranked}
    for slice_ in (first, second):
        tested = llm(wanted(slice_, results).ranked, TEST)
        assert {cell.alpha for cell in tested} == {0.0, 0.9}


def test_a_grid_that_names_no_choosing_seeds_chooses_by_all_of_its_own_in_every_slice():
    grid = dataclasses.replace(load_grid(str(TINY)), choose_seeds=())
    assert grid.with_argument("alpha=0.3").choose_seeds == ()
    assert grid.with_argument("seed=1").choose_seeds == (0, 1)
    assert grid.with_argument("seed=(0,1,2),seed=2").choose_seeds == (0, 1)
    assert load_grid(f"{TINY}:seed=1").choose_seeds == (0,)


def test_without_a_choice_everything_is_ranked_on_the_split():
    cells = cells_of(chosen=(), split=VALIDATION)
    found = wanted(cells, {})
    assert found.ranked == [(cell, VALIDATION) for cell in cells.all]
    assert found.to_come == 0
