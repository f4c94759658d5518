import numpy as np
import pytest

from search import Evolved, Objective, Tables, Wish, optimum, search
from search import run as run_module
from tests.support.table_examples import fifty_layers, many_layers, zero_error_tables


def of_bits(tables, bits):
    best = Objective(tables, 0.5, 0.5).assignment(bits)
    return Evolved(best.objective, best.bits, best.log_objective, 1, 0.1)


@pytest.fixture(scope="module")
def result():
    return search(fifty_layers(), seed=1)


def test_the_better_of_evolution_and_optimum_is_installed(result):
    assert result.installed_by == "optimum"
    assert result.installed == result.optimum.bits == optimum(result.tables, 0.5, 0.5).bits
    assert result.gap == pytest.approx(result.de.objective / result.optimum.objective - 1, rel=1e-12)
    assert result.gap > 0


def test_evolution_is_installed_where_it_is_better(monkeypatch):
    tables = fifty_layers()
    best = optimum(tables, 0.5, 0.5)
    monkeypatch.setattr(run_module, "optimum_of", lambda objective: objective.assignment((2,) * 54))
    monkeypatch.setattr(run_module, "evolve_objective", lambda *_: of_bits(tables, best.bits))
    found = search(tables)
    assert (found.installed_by, found.installed) == ("de", best.bits)


def test_of_two_assignments_without_error_the_one_with_fewer_bytes_is_installed(monkeypatch):
    tables = zero_error_tables(np.zeros((2, 2)))
    monkeypatch.setattr(run_module, "evolve_objective", lambda *_: of_bits(tables, (8, 8)))
    found = search(tables)
    assert (found.installed_by, found.installed, found.gap) == ("optimum", (2, 2), 0.0)


def test_evolution_alone_installs_what_it_found():
    found = search(fifty_layers(), method="de", seed=1)
    assert (found.installed_by, found.installed) == ("de", found.de.bits)
    assert found.optimum is None
    assert found.gap is None
    assert "optimum" not in found.to_json()


def test_the_exact_method_runs_no_evolution():
    found = search(fifty_layers(), method="exact")
    assert (found.installed_by, found.de, found.gap) == ("optimum", None, None)
    assert "de" not in found.to_json()


@pytest.mark.parametrize("wish", [Wish.bits(4.0), Wish.error(4), Wish.balance()], ids=str)
def test_evolution_alone_serves_powers_only(wish):
    tables = fifty_layers()
    tables = Tables(
        tables.layers, tables.widths, tables.error, tables.nbytes, 0, tables.values, tables.numel, "square", 1.0
    )
    with pytest.raises(ValueError, match="differential evolution alone serves the powers of error and"):
        search(tables, wish, "de")


def test_a_limit_is_kept_by_what_is_installed():
    budget = search(fifty_layers(), Wish.bits(4.0), seed=1)
    assert (budget.installed_by, budget.installed) == ("budget", budget.certified.bits)
    assert budget.certified.bits_a_value <= 4.0
    assert budget.to_json()["budget"]["lower_bound"] == budget.certified.error
    error = search(fifty_layers(), Wish.error(4), seed=1)
    assert (error.installed_by, error.installed) == ("bytes", error.certified.bits)
    assert error.certified.error <= error.tables.total_error((4,) * 54)
    assert error.to_json()["bytes"]["lower_bound"] == error.certified.nbytes


def test_a_population_above_a_gibibyte_leaves_the_exact_part_and_says_so():
    found = search(many_layers(6000), method="both")
    assert (found.installed_by, found.de) == ("optimum", None)
    assert found.notes == ("Differential evolution was left out: its population would take 1.3 GiB.",)
    with pytest.raises(ValueError, match="use the exact method, or a smaller popsize"):
        search(many_layers(6000), method="de")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "all"}, "a search's method is one of de, exact, both, got 'all'"),
        ({"popsize": 0}, "popsize of at least 1 and iterations of at least 0, got 0 and 2"),
        ({"iterations": -1}, "popsize of at least 1 and iterations of at least 0, got 5 and -1"),
        ({"popsize": 0, "method": "exact"}, "popsize of at least 1"),
        ({"wish": Wish.error(1)}, "one of the widths 2, 3, 4, 5, 6, 7, 8, got 1"),
        ({"wish": Wish.balance()}, "measure 'square'"),
    ],
)
def test_a_search_refuses_what_makes_no_sense(arguments, words):
    with pytest.raises(ValueError, match=words):
        search(fifty_layers(), **arguments)


def test_a_search_needs_the_layers_sizes():
    tables = Tables(["only"], [2, 4], [[2.0, 1.0]], [[2, 4]], dense_bytes=0, values=8)
    with pytest.raises(ValueError, match="a search needs the layers' sizes"):
        search(tables)


def test_settings_are_written_as_they_are_given():
    settings = {"type": "maxmin", "bucket size": 512, "error feedback": True, "hosts": None}
    content = search(fifty_layers(), seed=7, popsize=3, iterations=1, settings=settings).to_json()
    assert content["settings"] == settings
    assert (content["seed"], content["popsize"], content["iterations"], content["method"]) == (7, 3, 1, "both")
