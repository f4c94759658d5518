import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import front, search
from search.report import as_json
from tests.support.table_examples import every_assignment, fifty_layers, many_layers, small_tables

EVERY_MEASURE = st.sampled_from(["root", "loss"]).flatmap(lambda measure: small_tables(measure=measure))


@settings(deadline=None, max_examples=150)
@given(EVERY_MEASURE, st.integers(0, 1023))
def test_what_the_front_reaches_some_assignment_has(tables, pick):
    error, nbytes, _ = every_assignment(tables)
    pick %= len(error)
    room = 1e-9 * abs(tables.error).sum()
    reached = front(tables)
    least, fewest = reached.least_error(int(nbytes[pick])), reached.fewest_bytes(float(error[pick]))
    assert least is not None
    assert error[nbytes <= nbytes[pick]].min() <= least + room
    if fewest is not None:
        assert nbytes[error <= error[pick] + room].min() <= fewest
    assert reached.least_error(int(nbytes.min()) - 1) is None
    assert reached.fewest_bytes(float(error.min()) - 1) is None


def test_the_steps_of_the_csv_lead_to_its_totals():
    tables = fifty_layers()
    installed = search(tables, seed=0).installed
    reached = front(tables, installed)
    rows = list(csv.DictReader(io.StringIO(reached.to_csv())))
    bits = dict(zip(tables.layers, tables.bits(reached.walk.edges.start_L), strict=True))
    corners = [row for row in rows if row["kind"] == "front"]
    assert len(corners) == len(reached.walk.nbytes_P)
    for row in corners:
        if row["layer"]:
            bits[row["layer"]] = int(row["bits"])
        assignment = tuple(bits.values())
        assert int(row["encoded_bytes"]) == tables.encoded_bytes(assignment)
        assert float(row["error"]) == pytest.approx(tables.total_error(assignment), rel=1e-9)
        assert float(row["bits_a_value"]) == tables.bits_a_value(assignment)
        assert float(row["ratio"]) == tables.ratio(assignment)
    points = {row["kind"]: row for row in rows if row["kind"] != "front"}
    assert list(points) == [*(f"uniform {width}" for width in range(2, 9)), "installed"]
    assert float(points["installed"]["error"]) == tables.total_error(installed)


def test_the_json_says_the_same_as_the_csv():
    reached = front(fifty_layers(), (4,) * 54)
    content = json.loads(as_json(reached.to_json()))
    rows = [row for row in csv.DictReader(io.StringIO(reached.to_csv())) if row["kind"] == "front"]
    assert content["front"]["encoded_bytes"] == [int(row["encoded_bytes"]) for row in rows]
    assert content["front"]["error"] == [float(row["error"]) for row in rows]
    assert content["front"]["layer"] == [row["layer"] or None for row in rows]
    assert content["points"]["installed"] == content["points"]["uniform 4"]


def test_the_front_of_bounded_layers_keeps_their_bounds():
    tables = fifty_layers()
    content = front(tables, bounds={"layer3": (8, 8)}).to_json()
    assert content["start"][3] == 8 or "layer3" not in content["front"]["layer"]
    assert content["front"]["encoded_bytes"][0] > front(tables).to_json()["front"]["encoded_bytes"][0]


def test_twenty_thousand_layers_have_a_front():
    reached = front(many_layers(20_000))
    assert len(reached.to_csv().splitlines()) == 1 + len(reached.walk.nbytes_P) + 7
