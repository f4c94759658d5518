import json
import math
import re
from dataclasses import replace

import pytest

from search import SearchResult, Wish, as_text, load_scheme, logs, plot, search
from tests.support.table_examples import fifty_layers, many_layers, zero_error_tables

KEYS = {
    *("layers", "numel", "widths", "error", "nbytes", "dense_bytes", "values", "measure", "norm2", "alpha", "beta"),
    *("wish", "method", "popsize", "iterations", "seed", "pins", "settings", "notes", "uncompressed"),
    *("de", "optimum", "uniform", "installed"),
}


def objective(content, bits):
    """E^alpha C^beta from the file alone."""
    cells = [(row, content["widths"].index(width)) for row, width in enumerate(bits)]
    error = math.fsum(content["error"][row][column] for row, column in cells)
    nbytes = sum(content["nbytes"][row][column] for row, column in cells) + content["dense_bytes"]
    return error ** content["alpha"] * (nbytes / (4 * content["values"])) ** content["beta"]


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(fifty_layers(), seed=1)


def test_every_number_of_a_search_can_be_checked_from_its_file(result):
    content = json.loads(logs(result, 3, ["bn1.weight"])["search_3.json"])
    assert set(content) == KEYS
    assert set(content["de"]) == {"objective", "log_objective", "bits", "evaluations", "seconds"}
    assert set(content["optimum"]) == {"objective", "log_objective", "bits"}
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
    assert sum(errors.values()) == pytest.approx(result.tables.total_error(result.installed), rel=1e-12)


def test_a_written_scheme_is_read_back(result, tmp_path):
    path, layers = tmp_path / "scheme.json", result.tables.layers
    path.write_bytes(logs(result, 0, ["bn1.weight"])["compress_scheme_0.json"])
    assert load_scheme(path, layers, [*layers, "bn1.weight"]) == result.bits_by_layer()


def test_what_json_has_no_word_for_is_an_error(result):
    with pytest.raises(ValueError, match="not JSON compliant"):
        logs(replace(result, settings={"seconds": math.nan}), 0, [])


def test_the_text_sets_evolution_optimum_and_uniform_widths_side_by_side(result):
    text = as_text(result, 3)
    lines = text.splitlines()
    assert lines[0].startswith("Search, epoch 3: 54 layers of ")
    heading = next(row for row, line in enumerate(lines) if line.endswith("above optimum"))
    for name in ("uniform 2 bits", "uniform 8 bits", "differential evolution", "optimum"):
        assert sum(line.strip().startswith(name) for line in lines[heading + 1 :]) == 1
    assert f"{100 * result.gap:.4g} % above the optimum after 810 evaluations" in text
    assert "Installed: optimum." in lines
    assert len(lines) < 60
    assert as_text(result, "calibration").startswith("Search, calibration: ")


def test_a_bang_bang_optimum_is_called_so_with_the_powers_that_move_it(result):
    text = as_text(result, 0)
    count = result.optimum.bits.count(8)
    assert f"The optimum has {count} of 54 layers at 8 bits, the largest width" in text
    assert "bang-bang" in text
    assert "beta/alpha above" in text
    cheap = as_text(search(fifty_layers(), wish=Wish.objective(0.01, 50.0), seed=1), 0)
    assert "at 2 bits, the smallest width" in cheap


def test_an_optimum_of_many_widths_is_not_called_bang_bang():
    assert "bang-bang" not in as_text(search(fifty_layers(), wish=Wish.objective(0.5, 1.7), seed=1), 0)


def test_the_text_says_what_a_budget_achieved():
    text = as_text(search(fifty_layers(), Wish.bits(4.0), seed=1), 0)
    assert "which is the least possible." in text
    assert "Installed: least error in budget." in text


@pytest.mark.parametrize("wish", [None, Wish.bits(3.0), Wish.error(2), Wish.error(8)], ids=str)
def test_a_search_without_error_can_be_printed_written_and_drawn(wish):
    found = search(zero_error_tables(), wish, popsize=2, iterations=0, seed=0)
    text = as_text(found, 0)
    assert ("over 1e308 %" in text) == (found.installed != (8, 8) or wish is None)
    assert len(logs(found, 0, [])) == 3
    assert plot(found).startswith(b"\x89PNG\r\n")


def test_the_text_opens_with_what_is_gained(result):
    lines = as_text(search(fifty_layers(), Wish.bits(4.0), seed=1), 0).splitlines()
    assert lines[0].endswith("for the least error with at most 4 bits a value")
    assert lines[1].startswith("Bytes: 11.18 MB a gradient, 7.867 times fewer than the 87.94 MB of float32; 4.000 bits")
    assert lines[2].startswith("At equal bytes: uniform widths have a total error of ")
    assert lines[3].startswith("At equal error: uniform widths take ")
    assert lines[4].startswith("What the search can do for each uniform width")


def test_gains_are_those_of_uniform_widths_that_are_installed():
    tables = fifty_layers()
    found = search(tables, pins=dict.fromkeys(tables.layers, 4), seed=0)
    text = as_text(found, 0)
    error = tables.total_error((4,) * 54)
    assert f"uniform widths have a total error of {error:.4g}; the search's is {error:.4g}, 100 % of it." in text
    assert "the search's take 11.52 MB, 100 % of it." in text


def test_every_wish_is_named_in_the_callers_words(result):
    words = {
        "bits": "--bits {target:g}",
        "error": "--error {target:g}",
        "balance": "--balance",
        "objective": "-a",
    }
    text = as_text(result, 0, words)
    for width in range(2, 9):
        assert f"--error {width}" in text
    assert "--bits 4.1251" in text
    assert "Wish." not in text
    square = replace(fifty_layers(), measure="square", norm2=100.0)
    assert "ask with --balance." in as_text(search(square, seed=0), 0, words)


def test_what_the_text_promises_for_a_wish_the_wish_keeps(result):
    tables = result.tables
    lines = as_text(result, 0).splitlines()
    for width, line in zip(tables.widths, lines[6:], strict=False):
        name, _, _, least, ask, fewest, _ = re.split(r"\s{2,}", line.strip())
        assert name == f"uniform {width} bits"
        found = search(tables, Wish.bits(float(ask.removeprefix("Wish.bits(").removesuffix(")"))), "exact")
        assert found.certified.error <= float(least) * (1 + 1e-3)
        found = search(tables, Wish.error(width), "exact")
        promised = float(fewest.removesuffix(" MB")) * 1e6
        assert found.certified.nbytes + tables.dense_bytes <= promised * (1 + 1e-3)


def test_omega_is_told_where_it_is_known():
    tables = replace(fifty_layers(), norm2=100.0)
    found = search(tables, seed=0)
    omega = math.fsum(error**2 for error in found.error_by_layer().values()) / 100
    assert f", omega: {omega:.4g}." in as_text(found, 0)
    assert "omega" not in as_text(search(fifty_layers(), seed=0), 0).splitlines()[1]


def test_powers_that_leave_float64_are_printed_as_logarithms():
    text = as_text(search(fifty_layers(), Wish.objective(405.0, 1e-3), seed=0), 0)
    assert "e^1378." in text
    assert "over 1e308 %" in text
    assert "objective" in as_text(search(fifty_layers(), Wish.objective(1e-300, 1e300), seed=0), 0)


def test_powers_that_change_nothing_are_told_once(result):
    lines = as_text(result, 0).splitlines()
    rows = lines[lines.index("What other powers would make of the optimum:") + 2 :]
    assert len(rows) == len(set(rows)) > 1


def test_the_text_of_twenty_thousand_layers_is_a_page():
    text = as_text(search(many_layers(20_000), Wish.bits(4.0)), 0)
    assert len(text.splitlines()) < 60
    assert "  and 19,992 more, which take " in text
    assert "Differential evolution was left out: its population would take 14.9 GiB." in text


def test_the_layers_of_most_bytes_are_shown_with_their_pins():
    found = search(fifty_layers(), Wish.bits(4.0), "exact", pins={"layer27": 5})
    lines = as_text(found, 0).splitlines()
    first = lines[lines.index("Layers of most bytes:") + 2].split()
    assert first[:4] == ["layer27,", "pinned", "2,317,824", "5"]


@pytest.mark.parametrize("wish", [Wish.bits(3.0), Wish.error(3)], ids=str)
def test_changes_of_a_loss_are_printed_written_and_drawn(wish):
    tables = replace(fifty_layers(), measure="loss", error=fifty_layers().error - 1)
    found = search(tables, wish)
    text = as_text(found, 0)
    assert "least possible" in text or "fewest possible" in text
    assert "objective" not in text
    assert "Change of the loss: " in text
    assert "-" in text.splitlines()[1]
    assert len(logs(found, 0, [])) == 3
    assert plot(found).startswith(b"\x89PNG\r\n")
