import shutil
from pathlib import Path

import numpy as np
import pytest

from image_classification import data
from image_classification.data.folders import IMAGE_SUFFIXES, list_splits
from image_classification.torchvision_import import torchvision
from tests.support.image_folders import options, same, write_folder


def test_a_split_lists_what_torchvisions_image_folder_lists(tmp_path):
    root = write_folder(tmp_path, train=9, val=6, classes=3)
    nested = root / "train" / "class1" / "more" / "deep"
    nested.mkdir(parents=True)
    shutil.copy(root / "train" / "class0" / "000.jpg", nested / "UPPER.JPEG")
    (root / "train" / "class0" / "notes.txt").write_text("not an image")
    (root / "train" / "README").write_text("not a class")
    for split in list_splits(root, num_classes=3):
        theirs = torchvision.datasets.ImageFolder(split.folder)
        ours = [(str(split.path(index)), int(split.labels[index])) for index in range(len(split))]
        assert ours == theirs.samples
        assert list(split.classes) == theirs.classes


def test_image_suffixes_are_torchvisions():
    assert IMAGE_SUFFIXES == torchvision.datasets.folder.IMG_EXTENSIONS


def test_classes_are_the_sorted_folder_names(tmp_path):
    for name in ("b", "a", "10", "9", "ä"):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").touch()
    train, _ = list_splits(tmp_path, num_classes=5)
    assert train.classes == ("10", "9", "a", "b", "ä")
    assert np.array_equal(train.labels, range(5))


def test_a_missing_folder_is_named_with_the_layout_and_the_embedded_data_set(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^data folder .*/none does not exist; expected DIR/train/CLASS/\* and DIR/val/CLASS/\*, "
        r"or the word digits for the embedded data set$",
    ):
        list_splits(tmp_path / "none", 10)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "data.tar").touch()
    with pytest.raises(ValueError, match=r"^data folder .*/data.tar is not a folder; expected DIR/train"):
        list_splits(tmp_path / "data.tar", 10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(tmp_path, split):
    shutil.rmtree(write_folder(tmp_path) / split)
    with pytest.raises(ValueError, match=rf"^data folder {tmp_path} has no folder {split}; expected DIR/train"):
        list_splits(tmp_path, 10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_class_folders_is_named(tmp_path, split):
    folder = write_folder(tmp_path) / split
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "image.jpg").touch()
    with pytest.raises(ValueError, match=rf"^{folder} holds no class folders; expected DIR/train"):
        list_splits(tmp_path, 10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folders_are_named(tmp_path, split):
    write_folder(tmp_path, classes=3)
    for name in ("class0", "class2"):
        for image in (tmp_path / split / name).iterdir():
            image.rename(image.with_suffix(".txt"))
    with pytest.raises(
        ValueError, match=r"has class folders without an image: class0, class2; add images \(\.jpg \.jpeg "
    ) as caught:
        list_splits(tmp_path, 10)
    assert str(caught.value).startswith(str(tmp_path / split))


def test_classes_that_only_one_split_has_are_named(tmp_path):
    write_folder(tmp_path, classes=3)
    (tmp_path / "train" / "class1").rename(tmp_path / "train" / "clas1")
    shutil.rmtree(tmp_path / "val" / "class2")
    with pytest.raises(
        ValueError,
        match=r"/train and .*/val name different classes: only train has clas1, class2, only val has class1; give",
    ):
        list_splits(tmp_path, 10)


def test_of_many_names_the_first_few_are_told(tmp_path):
    write_folder(tmp_path, train=20, val=20, classes=10)
    for folder in (tmp_path / "val").iterdir():
        if folder.name != "class0":
            shutil.rmtree(folder)
    words = "only train has class1, class2, class3, class4, class5 and 4 more, only val has none; "
    with pytest.raises(ValueError, match=words):
        list_splits(tmp_path, 10)


def test_more_classes_than_the_model_has_are_counted(tmp_path):
    write_folder(tmp_path, classes=3)
    assert len(list_splits(tmp_path, 4)[0].classes) == 3
    with pytest.raises(
        ValueError, match=r"/train holds 3 classes, more than the 2 of the model; use `num_classes` 3$"
    ):
        list_splits(tmp_path, 2)


@pytest.mark.parametrize("name", ["spaces and ünicode.jpg", "line\nbreak.jpg", b"\xff\xfe.jpg"], ids=repr)
def test_any_file_name_is_found_again(tmp_path, name):
    write_folder(tmp_path)
    source = tmp_path / "train" / "class0" / "000.jpg"
    target = Path(str(source.parent)) / (name if isinstance(name, str) else name.decode(errors="surrogateescape"))
    source.rename(target)
    train, _ = list_splits(tmp_path, 10)
    assert target in [train.path(index) for index in range(len(train))]
    assert all(train.path(index).is_file() for index in range(len(train)))


@pytest.mark.parametrize("backend", ["pytorch", "dali-cpu"])
@pytest.mark.parametrize(("other", "needed"), [("train", {"training": False}), ("val", {"validation": False})])
def test_a_split_that_is_not_needed_may_be_missing_and_is_not_looked_into(tmp_path, backend, other, needed):
    root = write_folder(tmp_path)
    whole = batches_of(options(root, backend))
    for image in (root / other).rglob("*.jpg"):
        image.unlink()
    without_images = batches_of(options(root, backend, **needed))
    for folder in (root / other).iterdir():
        folder.rmdir()
    without_classes = batches_of(options(root, backend, **needed))
    (root / other).rmdir()
    position = ("train", "val").index(other)
    for found in (without_images, without_classes, batches_of(options(root, backend, **needed))):
        assert found[position] == []
        assert same(found[1 - position], whole[1 - position])


@pytest.mark.parametrize("needed", [{"train": False}, {"val": False}])
def test_where_both_splits_are_there_they_name_the_same_classes_whether_needed_or_not(tmp_path, needed):
    write_folder(tmp_path, classes=3)
    shutil.rmtree(tmp_path / "val" / "class0")  # else class1 would be scored as class0
    with pytest.raises(ValueError, match=r"name different classes: only train has class0, only val has none; give"):
        list_splits(tmp_path, 10, **needed)


def leave_hidden_names(root):
    """What macOS, notebooks and editors leave in every folder, some of it named like an image or a class."""
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", ".git"):
            for folder in (root / split, root / split / "class0", root / split / "class1"):
                (folder / name).mkdir()
                shutil.copy(root / split / "class0" / "000.jpg", folder / name / "copy.jpg")
        for name in (".DS_Store", "._000.jpg", ".hidden.png"):
            for folder in (root, root / split, root / split / "class0"):
                (folder / name).write_text("no image")


@pytest.mark.parametrize("backend", ["pytorch", "dali-cpu"])
def test_names_that_begin_with_a_dot_are_passed_over_by_every_backend(tmp_path, backend):
    root = write_folder(tmp_path / ".data")  # the folder itself may have such a name
    clean = batches_of(options(root, backend))
    leave_hidden_names(root)
    train, val = list_splits(root, num_classes=2)
    assert (len(train), len(val), train.classes) == (12, 7, ("class0", "class1"))
    assert all(map(same, clean, batches_of(options(root, backend))))


def batches_of(chosen):
    """All batches of the train and of the validation loader."""
    loaders = data.build(chosen)
    batches = [list(loader.epoch(0)) for loader in loaders]
    for loader in loaders:
        loader.close()
    return batches


def test_a_folder_that_links_lead_to_again_is_listed_once(tmp_path):
    root = write_folder(tmp_path, train=6, val=2)
    folder = root / "train" / "class0"
    (folder / "again").symlink_to(folder)
    (folder / "below").mkdir()
    (folder / "below" / "up").symlink_to(folder)
    (folder / "000.jpg").rename(folder / "below" / "000.jpg")
    train, _ = list_splits(root, 2)
    names = [name.decode() for name in train.names if name.startswith(b"class0")]
    assert names == ["class0/002.jpg", "class0/004.jpg", "class0/below/000.jpg"]
