"""DALI alone: who decodes, and what happens where it cannot."""

import pytest
import torch

from image_classification import data
from image_classification.data import dali
from tests.support.image_folders import options, picture, same, write_folder


def read(root, backend="dali-cpu", **changes):
    loaders = data.build(options(root, backend, **changes))
    try:
        return list(loaders[0].epoch(0))
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pillow_decodes_nothing_that_dali_can(tmp_path, monkeypatch, suffix):
    write_folder(tmp_path, suffix=suffix)
    monkeypatch.setattr(dali, "render", None)
    assert len(read(tmp_path)) == 3


def test_where_dali_fails_pillow_decodes_the_batch_and_a_warning_says_so(tmp_path, monkeypatch):
    write_folder(tmp_path)
    run, calls = dali.DaliReader._run, []

    def fails_once(reader, encoded):
        calls.append(len(encoded))
        if len(calls) == 2:
            raise RuntimeError("Critical error in pipeline: no reason\nwith a traceback")
        return run(reader, encoded)

    clean, by_pillow = read(tmp_path), read(tmp_path, "pytorch")
    monkeypatch.setattr(dali.DaliReader, "_run", fails_once)
    with pytest.warns(UserWarning, match="DALI failed on a batch, Pillow decodes it: Critical error in pipeline"):
        batches = read(tmp_path)
    assert same(batches, [clean[0], by_pillow[1], clean[2]])
    assert calls == [4, 4, 4]


def test_a_file_damaged_in_the_middle_changes_no_other_image(tmp_path):
    write_folder(tmp_path, classes=1)
    path = tmp_path / "train" / "class0" / "003.jpg"
    picture(300, 300, seed=1).save(path, quality=100)
    clean = read(tmp_path, batch_size=12)[0][0]
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = b"\xff\xd8\xff\xee" * 10
    path.write_bytes(content)
    damaged = read(tmp_path, batch_size=12)[0][0]
    changed = [not torch.equal(*pair) for pair in zip(clean, damaged, strict=True)]
    assert sum(changed) <= 1


def test_dali_gpu_without_a_gpu_is_an_error_that_says_what_to_use(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"^dali-gpu decodes on a CUDA device, .* trains on cpu; use dali-cpu$"):
        data.build(options(tmp_path, "dali-gpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_dali_gpu_shows_what_the_pytorch_backend_shows(tmp_path):
    write_folder(tmp_path)
    ours = read(tmp_path, "pytorch")
    others = read(tmp_path, "dali-gpu", device=torch.device("cuda"))
    for (images, labels), (seen, their_labels) in zip(ours, others, strict=True):
        assert torch.equal(labels, their_labels.cpu())
        assert (images - seen.cpu()).abs().mean() * 0.225 <= 2 / 255
