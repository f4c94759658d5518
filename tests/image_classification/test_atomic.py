"""Atomic files and folders: whole or not there, whatever goes wrong on the way."""

from pathlib import Path

import pytest

from image_classification.atomic import appearing, replacing


def test_a_file_is_replaced_where_the_block_ends_well_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with replacing(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_file_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_where_the_block_ends_well_and_not_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with appearing(folder) as beside:
        (beside / "inner").mkdir()
        (beside / "inner/file").write_bytes(b"content")
        assert not folder.exists()
    assert (folder / "inner/file").read_bytes() == b"content"
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), appearing(tmp_path / "folder") as beside:  # noqa: PT012
        (beside / "file").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_first_to_end_wins(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with appearing(folder) as late:
        (late / "late").touch()
        with appearing(folder) as early:
            (early / "early").touch()
    assert [each.name for each in folder.iterdir()] == ["early"]
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]
