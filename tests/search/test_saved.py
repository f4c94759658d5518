import json
import math

import numpy as np
import pytest

from search import Wish, false_claims, load_search, logs, search
from tests.support.table_examples import fifty_layers, zero_error_tables

OLD = {
    "layers": ["conv1.weight", "fc.weight"],
    "numel": [1024, 512],
    "widths": [2, 4, 8],
    "error": [[3.0, 0.75, 0.05], [1.5, 0.4, 0.02]],
    "nbytes": [[264, 520, 1032], [136, 264, 520]],
    "dense_bytes": 40,
    "values": 1546,
    "alpha": 0.5,
    "beta": 0.5,
    "de": {"objective": 0.13424119552869318, "bits": [8, 8], "evaluations": 30, "seconds": 0.0015998879998733173},
    "optimum": {"objective": 0.13424119552869318, "bits": [8, 8]},
    "uniform": {"2": 0.5658454846939333, "4": 0.39145134135931275, "8": 0.13424119552869318},
    "installed": {"by": "optimum", "objective": 0.13424119552869318, "bits": [8, 8]},
}
OLD_BUDGET = OLD | {
    "installed": {"by": "budget", "objective": 0.39145134135931275, "bits": [4, 4]},
    "budget": {"error": 1.15, "bits": [4, 4], "bits_a_value": 4.083333333333333, "lower_bound": 1.15},
}


def written(tmp_path, content):
    path = tmp_path / "search_0.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def same(first, second):
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    ("wish", "method", "pins"),
    [
        (Wish.objective(), "both", None),
        (Wish.objective(300.0, 1e300), "both", None),
        (Wish.objective(0.3, 2.0), "de", {"layer3": (4, 6)}),
        (Wish.bits(4.0), "both", {"layer3": 8}),
        (Wish.error(4), "exact", None),
    ],
)
def test_a_search_is_read_back_from_its_file(tmp_path, wish, method, pins):
    found = search(fifty_layers(), wish, method, seed=3, pins=pins, settings={"ranks": 2})
    path = written(tmp_path, logs(found, 0, [])["search_0.json"].decode())
    loaded = load_search(path)
    same(loaded, found)
    assert loaded.wish == wish
    assert loaded.settings == {"ranks": 2}
    assert loaded.tables.error.tolist() == found.tables.error.tolist()


def test_a_search_without_error_is_read_back(tmp_path):
    found = search(zero_error_tables(), seed=0)
    same(load_search(written(tmp_path, logs(found, 0, [])["search_0.json"].decode())), found)


@pytest.mark.parametrize("content", [OLD, OLD_BUDGET], ids=["powers", "budget"])
def test_files_of_before_load_and_hold(tmp_path, content):
    loaded = load_search(written(tmp_path, content))
    assert loaded.wish == (Wish.objective() if content is OLD else Wish.bits(4.083333333333333))
    assert loaded.installed == tuple(content["installed"]["bits"])
    assert loaded.installed_by == content["installed"]["by"]
    assert loaded.optimum.objective == content["optimum"]["objective"]
    assert false_claims(content) == []


def changed(content, *keys, value):
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file holds no JSON; give a search_N.json that a search wrote"),
        ("[" * 100_000, "the file holds no JSON"),
        ("[]", "a search's file is a JSON object, and this one is none"),
        ("{}", "a search's file has an entry 'error', and this one has none"),
        ({key: value for key, value in OLD.items() if key != "installed"}, "has an entry 'installed'"),
        ({key: value for key, value in OLD.items() if key != "alpha"}, "has an entry 'alpha'"),
        (changed(OLD, "error", value="x"), "search_0.json: "),
        (changed(OLD, "error", value=[[1, 2], [3]]), "search_0.json: "),
        (changed(OLD, "error", 0, 0, value=-1.0), "error must be finite and not negative, got -1.0 for conv1.weight"),
        (changed(OLD, "nbytes", 0, 0, value=0), "nbytes must be above 0"),
        (changed(OLD, "installed", "bits", value=[2, 3]), "one of the widths"),
        (changed(OLD, "installed", "by", value="luck"), "got 'luck'"),
        (changed(OLD, "installed", value=[]), "search_0.json: "),
        (OLD | {"wish": {"kind": "most"}}, "a wish is one of objective, bits, error, balance, time, got 'most'"),
        (OLD | {"wish": 3}, "search_0.json: "),
        (OLD | {"method": "luck"}, "got 'luck'"),
        (OLD | {"pins": {"fc.bias": [2, 4]}}, "pins must be of compressed layers, got one of fc.bias"),
        (OLD | {"measure": "luck"}, "got 'luck'"),
    ],
)
def test_a_file_that_tells_of_no_search_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are compared below, as they stand
        load_search(written(tmp_path, content))
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "give a search_N.json that a search wrote" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot read the file \(No such file or directory\)"):
        load_search(tmp_path / "none.json")


CLAIMS = [
    (("optimum", "objective"), 0.1, "optimum.objective is 0.1, and computed"),
    (("optimum", "bits"), [2, 2], "optimum is not the least objective"),
    (("de", "objective"), None, "de.objective is null, and computed"),
    (("uniform", "4"), 7.0, "uniform.4 is 7, and computed 0.391451341359"),
    (("installed", "bits"), [8, 4], "installed says that optimum found it, and optimum has other bits"),
    (("installed", "by"), "budget", "installed says that budget found it, and the file holds nothing of budget"),
    (("alpha",), 0.6, "computed"),
    (("dense_bytes",), 41, "computed"),
]


@pytest.mark.parametrize(("keys", "value", "words"), CLAIMS)
def test_a_false_claim_is_found(keys, value, words):
    assert any(words in claim for claim in false_claims(changed(OLD, *keys, value=value)))


LIMITS = [
    (("budget", "error"), 1.0, "budget.error is 1, and computed 1.15"),
    (("budget", "bits_a_value"), 3.0, "budget.bits_a_value is 3, and computed"),
    (("budget", "lower_bound"), 1.2, "budget.lower_bound is 1.2, and an assignment within the limit has 1.15"),
]


@pytest.mark.parametrize(("keys", "value", "words"), LIMITS)
def test_a_false_claim_of_a_limit_is_found(keys, value, words):
    assert any(words in claim for claim in false_claims(changed(OLD_BUDGET, *keys, value=value)))


@pytest.fixture(scope="module")
def content():
    found = search(fifty_layers(), Wish.error(4), seed=1, pins={"layer3": 8})
    return json.loads(logs(found, 0, [])["search_0.json"])


def test_what_a_search_writes_holds(content):
    assert false_claims(content) == []


def test_a_width_beyond_its_pin_is_found(content):
    assert "installed has 8 bits for layer3, beyond its pin" in false_claims(
        changed(content, "pins", "layer3", value=[2, 4])
    )


def test_an_assignment_beyond_its_limit_is_found(content):
    claims = false_claims(changed(content, "wish", "target", value=6))
    assert any(claim.startswith("bytes has an error of") and claim.endswith("of uniform 6 bits") for claim in claims)
    budget = json.loads(logs(search(fifty_layers(), Wish.bits(4.0), "exact"), 0, [])["search_0.json"])
    claims = false_claims(changed(budget, "wish", "target", value=3.9))
    assert any("above the budget of 3.9" in claim for claim in claims)


def test_a_worse_assignment_that_is_installed_is_found():
    row = json.loads(json.dumps(OLD))
    row["de"] |= {"bits": [2, 2], "objective": OLD["uniform"]["2"]}
    row["installed"] = {"by": "de", "bits": [2, 2], "objective": OLD["uniform"]["2"]}
    assert "installed is what de found, and optimum found something better" in false_claims(row)


def test_errors_below_zero_are_read_and_hold(tmp_path):
    error = fifty_layers().error - np.linspace(0, 1, 54)[:, None]
    tables = type(fifty_layers())(**{**vars(fifty_layers()), "error": error, "measure": "loss"})
    found = search(tables, Wish.bits(3.0))
    content = logs(found, 0, [])["search_0.json"].decode()
    assert load_search(written(tmp_path, content)).certified == found.certified
    assert false_claims(json.loads(content)) == []
    assert "uniform" not in json.loads(content)
    assert math.isfinite(found.certified.lower_bound)
