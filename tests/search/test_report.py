import json
import math
from dataclasses import replace

import numpy as np
import pytest

from search import Evolved, SearchResult, Tables, as_text, load_scheme, logs, optimum, plot, search
from search import run as run_module
from tests.support.table_examples import fifty_layers

KEYS = {
    *("layers", "numel", "widths", "error", "nbytes", "dense_bytes", "values", "alpha", "beta"),
    *("de", "optimum", "uniform", "installed"),
}


def zero_error_tables():
    return Tables(["a", "b"], [2, 8], [[1, 0], [2, 0]], [[2, 8], [2, 8]], dense_bytes=4, values=20, numel=[8, 8])


def objective(content, bits):
    """E^alpha C^beta from the file alone."""
    cells = [(row, content["widths"].index(width)) for row, width in enumerate(bits)]
    error = math.fsum(content["error"][row][column] for row, column in cells)
    nbytes = sum(content["nbytes"][row][column] for row, column in cells) + content["dense_bytes"]
    return error ** content["alpha"] * (nbytes / (4 * content["values"])) ** content["beta"]


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(fifty_layers(), seed=1)


def test_the_better_of_evolution_and_optimum_is_installed(result):
    assert result.installed_by == "optimum"
    assert result.installed == result.optimum == optimum(result.tables, 0.5, 0.5)
    assert result.gap == result.de.objective / result.optimum.objective - 1 > 0


def test_evolution_is_installed_where_it_is_better(monkeypatch):
    tables = fifty_layers()
    best = optimum(tables, 0.5, 0.5)
    monkeypatch.setattr(run_module, "optimum", lambda *_: replace(best, objective=3.0, bits=(2,) * 54))
    monkeypatch.setattr(run_module, "evolve", lambda *_: Evolved(best.objective, best.bits, 1, 0.1))
    found = search(tables)
    assert (found.installed_by, found.installed.bits) == ("de", best.bits)


def test_of_two_assignments_without_error_the_one_with_fewer_bytes_is_installed(monkeypatch):
    tables = replace(zero_error_tables(), error=np.zeros((2, 2)))
    monkeypatch.setattr(run_module, "evolve", lambda *_: Evolved(0.0, (8, 8), 1, 0.1))
    found = search(tables)
    assert (found.installed_by, found.installed.bits, found.gap) == ("optimum", (2, 2), 0.0)


def test_a_budget_is_installed_where_there_is_one():
    found = search(fifty_layers(), seed=1, target_bits=4.0)
    assert found.installed_by == "budget"
    assert found.installed.bits == found.budget.bits
    assert found.budget.bits_a_value <= 4.0
    assert "budget" in found.to_json()


def test_every_number_of_a_search_can_be_checked_from_its_file(result):
    content = json.loads(logs(result, 3, ["bn1.weight"])["search_3.json"])
    assert set(content) == KEYS
    assert set(content["de"]) == {"objective", "bits", "evaluations", "seconds"}
    assert set(content["optimum"]) == {"objective", "bits"}
    for found in (content["de"], content["optimum"], content["installed"]):
        assert found["objective"] == pytest.approx(objective(content, found["bits"]), rel=1e-12)
    assert set(content["uniform"]) == {"2", "3", "4", "5", "6", "7", "8"}
    for width, value in content["uniform"].items():
        assert value == pytest.approx(objective(content, [int(width)] * 54), rel=1e-12)
    assert content["numel"] == list(result.tables.numel)


def test_the_logs_hold_errors_and_widths_by_layer_name(result):
    files = logs(result, "calibration", ["bn1.weight", "bn1.bias"])
    names = ["compress_scheme_calibration.json", "epochcalibration.json", "search_calibration.json"]
    assert sorted(files) == names
    assert all(content.endswith(b"}\n") for content in files.values())
    scheme = json.loads(files[names[0]])
    assert scheme["32"] == ["bn1.weight", "bn1.bias"]
    widths = {name: int(width) for width, layers in scheme.items() for name in layers if width != "32"}
    assert widths == result.bits_by_layer()
    errors = json.loads(files[names[1]])
    assert list(errors) == list(result.tables.layers)
    column = result.tables.widths.index(widths["layer7"])
    assert errors["layer7"] == result.tables.error[7, column]
    assert sum(errors.values()) == pytest.approx(result.tables.total_error(result.installed.bits), rel=1e-12)


def test_a_written_scheme_is_read_back(result, tmp_path):
    path, layers = tmp_path / "scheme.json", result.tables.layers
    path.write_bytes(logs(result, 0, ["bn1.weight"])["compress_scheme_0.json"])
    assert load_scheme(path, layers, [*layers, "bn1.weight"]) == result.bits_by_layer()


def test_what_json_has_no_word_for_is_an_error(result):
    with pytest.raises(ValueError, match="not JSON compliant"):
        logs(replace(result, alpha=math.nan), 0, [])


def test_the_text_sets_evolution_optimum_and_uniform_widths_side_by_side(result):
    text = as_text(result, 3)
    lines = text.splitlines()
    assert lines[0].startswith("Search, epoch 3: 54 layers of ")
    for name in ("uniform 2 bits", "uniform 8 bits", "differential evolution", "optimum"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    assert f"{100 * result.gap:.4g} % above the optimum after 810 evaluations" in text
    assert "Installed: optimum." in lines
    assert len(lines) < 40
    assert as_text(result, "calibration").startswith("Search, calibration: ")


def test_a_bang_bang_optimum_is_called_so_with_the_powers_that_move_it(result):
    text = as_text(result, 0)
    count = result.optimum.bits.count(8)
    assert f"The optimum has {count} of 54 layers at 8 bits, the largest width" in text
    assert "bang-bang" in text
    assert "beta/alpha above" in text
    cheap = as_text(search(fifty_layers(), alpha=0.01, beta=50.0, seed=1), 0)
    assert "at 2 bits, the smallest width" in cheap


def test_an_optimum_of_many_widths_is_not_called_bang_bang():
    assert "bang-bang" not in as_text(search(fifty_layers(), alpha=0.5, beta=1.7, seed=1), 0)


def test_the_text_says_what_a_budget_achieved():
    text = as_text(search(fifty_layers(), seed=1, target_bits=4.0), 0)
    assert "which is the least possible." in text
    assert "Installed: least error in budget." in text


@pytest.mark.parametrize("target_bits", [None, 3.0])
def test_a_search_without_error_can_be_printed_written_and_drawn(target_bits):
    found = search(zero_error_tables(), popsize=2, iterations=0, seed=0, target_bits=target_bits)
    text = as_text(found, 0)
    assert "inf %" in text
    assert len(logs(found, 0, [])) == 3
    assert plot(found).startswith(b"\x89PNG\r\n")


def test_the_plot_is_a_png(result):
    assert plot(result).startswith(b"\x89PNG\r\n")
