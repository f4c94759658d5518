"""`python -m search`: what it says and with which code it exits."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import search
from search import Wish, load_scheme, logs
from search.__main__ import main
from tests.support.table_examples import fifty_layers, many_layers

UNCOMPRESSED = ["bn1.weight", "bn1.bias"]


@pytest.fixture
def file(tmp_path):
    found = search.search(fifty_layers(), Wish.bits(4.0), seed=1, settings={"bucket size": 512})
    for name, content in logs(found, 3, UNCOMPRESSED).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path / "search_3.json"


def refusal(capsys, *arguments):
    """The one line of an exit with 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("python -m search: error: ")
    return err


def test_a_file_that_holds_is_reported(file, capsys):
    assert main([str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: every claim holds.\nSearch, 3: 54 layers of ")
    assert "which is the least possible." in out
    assert "  bucket size: 512\n" in out
    assert "--target-error 4" in out


def test_a_false_claim_ends_with_1(file, capsys):
    content = json.loads(file.read_text())
    content["budget"]["error"] /= 2
    file.write_text(json.dumps(content))
    assert main([str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: budget.error is 0.89297")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("wish", "by"),
    [
        (["--target-bits", "3"], "least error in budget"),
        (["--search-target-bits", "3"], "least error in budget"),
        (["--target-error", "3"], "fewest bytes within error"),
        (["--alpha", "1", "--beta", "3"], "optimum"),
        (["--alpha", "1", "--beta", "3", "--method", "de"], "differential evolution"),
        (["--alpha", "405", "--beta", "1e300", "--method", "both"], "optimum"),
        (["--pin", "layer3=8", "--pin", "layer2?=2-3"], "least error in budget"),
    ],
)
def test_a_file_is_solved_for_another_wish(file, capsys, tmp_path, wish, by):
    scheme = tmp_path / "scheme.json"
    assert main([str(file), *wish, "-o", str(scheme)]) == 0
    out = capsys.readouterr().out
    assert f"Installed: {by}." in out
    layers = fifty_layers().layers
    bits = load_scheme(scheme, layers, [*layers, *UNCOMPRESSED])
    if "--pin" in wish:
        assert bits["layer3"] == 8
        assert {bits[f"layer2{digit}"] for digit in range(10)} <= {2, 3}
    assert json.loads(scheme.read_text())["32"] == UNCOMPRESSED


def test_pins_of_the_file_stay_and_new_ones_go_before_them(tmp_path, capsys):
    found = search.search(fifty_layers(), Wish.bits(4.0), "exact", pins={"layer3": 2, "layer4": 2})
    file, scheme = tmp_path / "search_0.json", tmp_path / "scheme.json"
    file.write_bytes(logs(found, 0, [])["search_0.json"])
    assert main([str(file), "--target-bits", "5", "--pin", "layer3=8", "-o", str(scheme)]) == 0
    bits = load_scheme(scheme, fifty_layers().layers)
    assert (bits["layer3"], bits["layer4"]) == (8, 2)


def test_it_draws_and_writes_the_front(file, tmp_path, capsys):
    picture, front, content = (tmp_path / name for name in ("a.png", "front.csv", "front.json"))
    assert main([str(file), "--plot", str(picture), "--front", str(front)]) == 0
    assert main([str(file), "--front", str(content)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    rows = list(csv.DictReader(front.open(newline="")))
    assert rows[-1]["kind"] == "installed"
    assert json.loads(content.read_text())["points"]["installed"]["error"] == float(rows[-1]["error"])


def test_several_files_are_checked_and_drawn_over_time(file, tmp_path, capsys):
    other, picture = tmp_path / "search_4.json", tmp_path / "time.png"
    other.write_bytes(file.read_bytes())
    assert main([str(file), str(other), "--over-time", str(picture)]) == 0
    assert capsys.readouterr().out == f"{file}: every claim holds.\n{other}: every claim holds.\n"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert "several files can be checked and drawn over time" in refusal(capsys, file, other, "--target-bits", 3)


def test_two_schemes_are_compared(file, tmp_path, capsys):
    scheme = tmp_path / "compress_scheme_3.json"
    assert main([str(file), "--against", str(scheme)]) == 0
    assert "They give every layer the same width." in capsys.readouterr().out
    assert main([str(file), "--target-bits", "3", "--against", str(file)]) == 0
    assert "of 54 layers differ; most in bytes:" in capsys.readouterr().out


REFUSED = {
    "none.json": "none.json: cannot read the file (No such file or directory)",
    "FILE --target-bits 0": "a finite number of bits a value above 0, got 0.0",
    "FILE --target-bits x": "argument --target-bits/--search-target-bits: invalid float value: 'x'",
    "FILE --target-bits 1": "a budget must hold the cheapest assignment",
    "FILE --target-error 1": "one of the widths 2, 3, 4, 5, 6, 7, 8, got 1",
    "FILE --target-error 9": "a uniform width of 1 to 8 bits, got 9",
    "FILE --target-bits 3 --balance": "not allowed with argument",
    "FILE --balance": "these errors are of measure 'root'; measure 'square'",
    "FILE --alpha 1": "--alpha and --beta are powers of one objective; give both",
    "FILE --beta 1": "--alpha and --beta are powers of one objective; give both",
    "FILE --alpha 0 --beta 1": "the search's alpha must be a finite number above 0, got 0.0",
    "FILE --alpha 1 --beta 1 --target-bits 3": "not allowed with argument",
    "FILE --pin fc=8": "the pin 'fc=8' matches no compressed layer; there are layer0",
    "FILE --pin layer1": "a pin is PATTERN=BITS",
    "FILE --target-bits 3 --method de": "differential evolution alone serves the powers",
    "FILE --method luck": "argument --method/--search-method: invalid choice: 'luck'",
    "FILE --against FOLDER": "cannot read the file (Is a directory)",
    "FILE --against EMPTY": "every compressed layer a width, but layer0 (and 53 more) has none",
    "FILE -o FOLDER/none/x.json": "none/x.json: there is no folder",
    "FILE -o FILE": "is read and would be written over; give another name",
    "FILE FILE": "every file is given once",
    "EMPTY": "a search's file has an entry 'error', and this one has none",
    "": "the following arguments are required: FILE",
}


def test_a_budget_that_holds_everything_is_no_limit(file, capsys):
    assert main([str(file), "--target-bits", "1e308"]) == 0
    assert "which is the least possible" in capsys.readouterr().out


DAMAGED = {
    "popsize": None, "iterations": {}, "notes": [1], "uncompressed": 1, "values": 10**400, "widths": "abc",
    "installed": {"by": "optimum", "bits": "x"}, "optimum": 3, "de": {"seconds": None}, "wish": {"kind": []},
}  # fmt: skip


@pytest.mark.parametrize("entry", DAMAGED)
def test_a_damaged_file_is_one_line(file, tmp_path, capsys, entry):
    content = json.loads(file.read_text())
    (tmp_path / "damaged.json").write_text(json.dumps({**content, entry: DAMAGED[entry]}))
    for flags in ([], ["--target-bits", "4", "--method", "both", "-o", str(tmp_path / "scheme.json")]):
        try:
            status = main([str(tmp_path / "damaged.json"), *flags])
        except SystemExit as end:
            status = end.code
            assert capsys.readouterr().err.count("\n") == 1
        assert status in (0, 1, 2)


def test_a_false_optimum_is_found_out_whatever_else_a_file_leaves_out(file, tmp_path, capsys):
    content = json.loads(file.read_text())
    worst = [content["widths"][0]] * len(content["layers"])
    for name in ("uniform", "de", "budget", "notes"):
        content.pop(name, None)
    content["wish"] = {"kind": "objective", "alpha": 0.5, "beta": 0.5}
    content["optimum"] = {"objective": 1e-9, "bits": worst}
    content["installed"] = {"by": "optimum", "objective": 1e-9, "bits": worst}
    (tmp_path / "lie.json").write_text(json.dumps(content))
    assert main([str(tmp_path / "lie.json")]) == 1
    assert "optimum.objective is 1e-09" in capsys.readouterr().out


def test_the_advised_budget_can_be_asked_for(file, tmp_path, capsys):
    """Rounded up, and within reach of pins."""
    for pins in ([], ["--pin", "*=6-8"]):
        assert main([str(file), "--alpha", "0.5", "--beta", "0.5", *pins]) == 0
        asked = re.search(r"ask for it: --target-bits ([\d.]+)\.", capsys.readouterr().out)
        if asked:
            assert main([str(file), "--target-bits", asked[1], *pins]) == 0
            capsys.readouterr()


def test_files_of_one_name_are_told_apart_by_their_folders(file, tmp_path, monkeypatch):
    from search import plotting

    drawn = []
    monkeypatch.setattr(plotting, "plot_bits_over_time", lambda results: drawn.append(list(results)) or b"")
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    other.write_bytes(file.read_bytes())
    assert main([str(file), str(other), "--over-time", str(tmp_path / "time.png")]) == 0
    assert len(drawn[0]) == 2


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_refused_in_one_line(file, tmp_path, capsys, line):
    (tmp_path / "empty.json").write_text("{}")
    places = {"FILE": file, "EMPTY": tmp_path / "empty.json"}
    words = [word.replace("FOLDER", str(tmp_path)) for word in line.split()]
    assert REFUSED[line] in refusal(capsys, *(places.get(word, word) for word in words))


def test_twenty_thousand_layers_are_checked_solved_drawn_and_compared(tmp_path, capsys):
    found = search.search(many_layers(20_000), Wish.bits(4.0))
    file = tmp_path / "search_0.json"
    file.write_bytes(logs(found, 0, [])["search_0.json"])
    assert main([str(file)]) == 0
    more = ["--plot", str(tmp_path / "a.png"), "--front", str(tmp_path / "a.csv"), "--against", str(file)]
    assert main([str(file), "--target-error", "4", "-o", str(tmp_path / "scheme.json"), *more]) == 0
    out = capsys.readouterr().out
    assert "every claim holds" in out
    assert len(out.splitlines()) < 150


def test_it_runs_as_a_module(file):
    root = Path(search.__file__).parents[1]
    command = [sys.executable, "-m", "search", str(file)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "every claim holds" in ran.stdout
    ran = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | head -1', "bash", *command],
        cwd=root, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = subprocess.run([*command, "--target-bits", "1"], cwd=root, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
