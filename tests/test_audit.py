"""What the audit of the pins prints: holes by their pin, and that nothing answered where nothing did."""

from tests.support.markdown import ROOT
from tests.support.modules import loaded

report = loaded(ROOT / ".ci" / "audit.py").report


def test_holes_are_named_with_the_version_that_mends_them() -> None:
    pins = [
        {"name": "a", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]},
        {"name": "b", "version": "2.0", "vulns": []},
        {"name": "c", "skip_reason": "not found"},
    ]
    assert report(pins) == [
        "audit: a 1.0: PYSEC-1, mended in 1.1",
        "audit: 1 known holes in 2 of 3 pins that were looked up",
    ]


def test_an_index_that_knows_no_pin_is_no_answer() -> None:
    assert report([{"name": "a", "skip_reason": "not found"}]) == [
        "audit: skipped, no answer about any of 1 pins"
    ]
