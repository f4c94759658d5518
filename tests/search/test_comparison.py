from search import compare
from tests.support.table_examples import fifty_layers, many_layers


def test_two_schemes_are_told_apart_by_their_totals_and_their_layers():
    tables = fifty_layers()
    second = list((4,) * 54)
    second[3], second[27] = 8, 2
    lines = compare(tables, (4,) * 54, second, ("a.json", "b.json")).splitlines()
    assert lines[1].split() == ["a.json", "4.125", "11.52", "MB", f"{tables.total_error((4,) * 54):.4g}"]
    assert lines[2].split()[0] == "b.json"
    assert lines[3] == "2 of 54 layers differ; most in bytes:"
    assert lines[5].split()[:5] == ["layer27", f"{tables.numel[27]:,}", "4", "->", "2"]
    assert lines[6].split()[0] == "layer3"
    assert len(lines) == 7


def test_equal_schemes_are_called_so():
    text = compare(fifty_layers(), (4,) * 54, (4,) * 54, ("a.json", "b.json"))
    assert text.endswith("They give every layer the same width.")


def test_of_many_layers_those_that_differ_most_are_shown():
    tables = many_layers(20_000)
    text = compare(tables, (4,) * 20_000, (5,) * 20_000, ("a.json", "b.json"))
    assert "20,000 of 20,000 layers differ; most in bytes:" in text
    assert "  and 19,988 more; those shown make " in text
    assert len(text.splitlines()) < 20
