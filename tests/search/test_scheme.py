import json

import pytest

from search import families_in, load_options, load_scheme, option_of
from search.scheme import scheme_of_options

COMPRESSED = ["conv1.weight", "fc.weight"]
PARAMETERS = ["conv1.weight", "bn1.weight", "bn1.bias", "fc.weight"]


def load(tmp_path, content):
    path = tmp_path / "scheme.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_scheme(path, COMPRESSED, PARAMETERS)


@pytest.mark.parametrize("uncompressed", [{}, {"32": []}, {"32": ["bn1.bias"]}, {"32": ["bn1.weight", "bn1.bias"]}])
def test_a_scheme_need_not_list_what_is_not_compressed(tmp_path, uncompressed):
    widths = load(tmp_path, {"8": ["fc.weight"], "1": ["conv1.weight"], **uncompressed})
    assert widths == {"conv1.weight": 1, "fc.weight": 8}
    assert list(widths) == COMPRESSED


def test_one_width_may_stand_in_two_entries(tmp_path):
    assert load(tmp_path, '{"4": ["fc.weight"], "4": ["conv1.weight"]}') == {
        "conv1.weight": 4,
        "fc.weight": 4,
    }


GOOD = '"4": ["conv1.weight", "fc.weight"]'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "a scheme is a JSON object of widths to lists of layer names, and this file is none"),
        ("[]", "a scheme is a JSON object"),
        ('[["4", ["fc.weight"]]]', "a scheme is a JSON object"),
        ("null", "a scheme is a JSON object"),
        ("[" * 100_000, "a scheme is a JSON object"),
        ("{}", r"every compressed layer a width, but conv1\.weight \(and 1 more\) has none; add it"),
        ('{"4": ["fc.weight"]}', r"but conv1\.weight has none; add it under 1 to 8"),
        (f'{{{GOOD}, "9": []}}', "a width is 1 to 8 bits, or 32 for what is not compressed, got '9'"),
        (f'{{{GOOD}, "0": []}}', "a width is 1 to 8 bits, .* got '0'"),
        (f'{{{GOOD}, "four": []}}', "a width is 1 to 8 bits, .* got 'four'"),
        (f'{{{GOOD}, "8": "fc.weight"}}', 'width 8 needs a list of layer names, got "fc.weight"'),
        (f'{{{GOOD}, "8": [7]}}', r"width 8 needs a list of layer names, got \[7\]"),
        (f'{{{GOOD}, "8": {{"a": 1}}}}', "width 8 needs a list of layer names"),
        (
            f'{{{GOOD}, "8": ["fc.weight"]}}',
            r"a layer has one width, but fc\.weight is listed twice; remove one",
        ),
        (f'{{{GOOD}, "8": ["fc.wait"]}}', r"the model has no layer fc\.wait \(width 8\); remove it"),
        (
            '{"4": ["fc.weight"], "32": ["conv1.weight"]}',
            r"conv1\.weight is compressed, and width 32 is for what is",
        ),
        (
            f'{{{GOOD}, "8": ["bn1.bias"]}}',
            r"bn1\.bias is not compressed and has no width, got 8; move it to 32",
        ),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "scheme.json"))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot read the scheme \(No such file or directory\); give a"):
        load_scheme(tmp_path / "none.json", COMPRESSED, PARAMETERS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary: cannot read the scheme \(not UTF-8 text\)"):
        load_scheme(tmp_path / "binary", COMPRESSED, PARAMETERS)
    with pytest.raises(ValueError, match=r"cannot read the scheme \(Is a directory\)"):
        load_scheme(tmp_path, COMPRESSED, PARAMETERS)


def test_without_the_models_names_any_may_stand_under_32(tmp_path):
    path = tmp_path / "scheme.json"
    path.write_text(json.dumps({"4": ["fc.weight"], "8": ["conv1.weight"], "32": ["bn7.weight"]}))
    assert load_scheme(path, COMPRESSED) == {"conv1.weight": 8, "fc.weight": 4}
    path.write_text(json.dumps({"4": [*COMPRESSED, "bn7.weight"]}))
    with pytest.raises(ValueError, match=r"no layer bn7\.weight \(width 4\)"):
        load_scheme(path, COMPRESSED)


def test_a_scheme_of_families_is_written_and_read_back(tmp_path):
    common = {"none": {}, "eden": {"bucket_size": 64}, "topk": {}}
    options = {"a": option_of("eden 3", common), "b": option_of("topk 0.01", common), "c": option_of("none", common)}
    path = tmp_path / "scheme.json"
    path.write_text(json.dumps(scheme_of_options(options, ["bias"])))
    assert json.loads(path.read_text()) == {"eden 3": ["a"], "topk 0.01": ["b"], "none": ["c"], "32": ["bias"]}
    assert families_in(path) == ("eden", "topk", "none")
    assert load_options(path, ["a", "b", "c"], common, ["a", "b", "c", "bias"]) == options
    with pytest.raises(ValueError, match="add it under an option, or search again"):
        load_options(path, ["a", "b", "c", "d"], common)
    path.write_text(json.dumps({"svd 3": ["a"]}))
    with pytest.raises(ValueError, match=r"an option is a family and its setting, .* got 'svd 3'"):
        load_options(path, ["a"], common)
    path.write_text(json.dumps({"4": ["a"], "32": ["bias"]}))
    assert families_in(path) == ()
