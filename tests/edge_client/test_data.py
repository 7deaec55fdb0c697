"""Pictures on the device: what is found, what is left out, what is refused, and what is kept in memory."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_lora.preprocess import load_preprocessing
from edge_client.data import DIGIT_NAMES, Dataset, find_pictures, open_dataset
from edge_client.errors import DataError

PIXELS = 64 * 64 * 3


@pytest.fixture(scope="module")
def preprocessing():
    return load_preprocessing("tiny-clip")


@pytest.fixture
def folder(tmp_path):
    """Two cats and three dogs, each of one colour."""
    for label, count in (("cat", 2), ("dog", 3)):
        (tmp_path / label).mkdir()
        for number in range(count):
            Image.new("RGB", (70, 80), (number * 40, 0, 100)).save(tmp_path / label / f"{number}.png")
    return tmp_path


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING, logger="edge_client.data")
    return lambda: [entry.getMessage() for entry in caplog.records]


def test_labels_index_the_class_bank_in_its_own_order(folder, preprocessing):
    data = open_dataset(str(folder), ["bird", "dog", "cat"], preprocessing)
    assert data.labels.tolist() == [2, 2, 1, 1, 1]
    assert data.labels.dtype == np.int32
    assert len(data) == 5


def test_pixels_are_the_named_pictures_preprocessed(folder, preprocessing):
    data = open_dataset(str(folder), ["cat", "dog"], preprocessing)
    batch = data.pixels([4, 0])
    assert batch.shape == (2, 64, 64, 3)
    assert batch.dtype == np.uint8
    assert batch[0, 30, 30].tolist() == [80, 0, 100]
    assert batch[1, 30, 30].tolist() == [0, 0, 100]


def test_pictures_in_deeper_folders_count_for_the_class_above_and_other_files_are_ignored(folder):
    (folder / "cat" / "kittens").mkdir()
    Image.new("L", (5, 5)).save(folder / "cat" / "kittens" / "a.JPG", "jpeg")
    (folder / "cat" / "notes.txt").write_text("no picture")
    (folder / "README.md").write_text("no picture")
    (folder / ".cache").mkdir()
    Image.new("L", (5, 5)).save(folder / ".cache" / "a.png")
    found = find_pictures(str(folder))
    assert [picture.label for picture in found] == ["cat"] * 3 + ["dog"] * 3
    assert found[2].name.endswith("a.JPG")


def test_the_order_is_that_of_the_names_and_not_of_the_disk(folder):
    for late in ("zz.png", "aa.png", "5.png"):
        Image.new("L", (5, 5)).save(folder / "cat" / late)
    names = [picture.name for picture in find_pictures(str(folder))]
    assert names == sorted(names)
    assert len(names) == 8


def test_a_class_that_the_bank_does_not_know_is_named_with_those_it_knows(folder, preprocessing):
    with pytest.raises(DataError) as caught:
        open_dataset(str(folder), ["cat", "bird"], preprocessing)
    assert "'dog'" in str(caught.value)
    assert "it knows cat, bird)" in str(caught.value)


def test_a_long_list_of_known_classes_is_cut(folder, preprocessing):
    with pytest.raises(DataError) as caught:
        open_dataset(str(folder), [f"class {n}" for n in range(100)], preprocessing)
    assert "class 19, ...)" in str(caught.value)
    assert "class 20" not in str(caught.value)


def test_an_empty_folder_of_an_unknown_class_does_no_harm(folder, preprocessing):
    (folder / "unicorn").mkdir()
    assert len(open_dataset(str(folder), ["cat", "dog"], preprocessing)) == 5


def test_a_missing_folder_is_named(tmp_path, preprocessing):
    with pytest.raises(DataError, match=rf"{tmp_path / 'absent'}: no such folder"):
        open_dataset(str(tmp_path / "absent"), ["cat"], preprocessing)


def test_an_empty_folder_and_one_without_sub_folders_are_told_the_layout(tmp_path, preprocessing):
    for _ in range(2):
        with pytest.raises(DataError, match="one sub-folder per class"):
            open_dataset(str(tmp_path), ["cat"], preprocessing)
        Image.new("L", (5, 5)).save(tmp_path / "loose.png")


def damage(folder, kind):
    file = folder / "dog" / "1.png"
    if kind == "text":
        file.write_text("this is no picture")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "dangling":
        file.unlink()
        file.symlink_to(folder / "nowhere.png")
    else:
        file.unlink()
        file.mkdir()
    return file


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "dangling", "folder"])
def test_a_picture_that_cannot_be_read_is_left_out_with_a_warning_that_names_it(folder, preprocessing, warnings_of, kind):
    file = damage(folder, kind)
    data = open_dataset(str(folder), ["cat", "dog"], preprocessing)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert str(file) not in [picture.name for picture in data.pictures]
    assert len(warnings_of()) == 1
    assert str(file) in warnings_of()[0]


def test_readable_pictures_give_no_warning(folder, preprocessing, warnings_of):
    open_dataset(str(folder), ["cat", "dog"], preprocessing)
    assert warnings_of() == []


def test_a_folder_of_nothing_but_unreadable_pictures_is_refused(folder, preprocessing, warnings_of):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"?")
    with pytest.raises(DataError, match="none of its 5 pictures can be read"):
        open_dataset(str(folder), ["cat", "dog"], preprocessing)
    assert len(warnings_of()) == 5


def test_digits_are_real_pictures_of_ten_classes(preprocessing):
    data = open_dataset("digits", DIGIT_NAMES, preprocessing)
    assert len(data) == 1797
    assert sorted(set(data.labels.tolist())) == list(range(10))
    first = data.pictures[0]
    assert (first.label, first.load().size, first.load().getextrema()) == ("zero", (8, 8), (0, 239))


def test_digits_against_a_bank_that_lacks_some_name_the_missing(preprocessing):
    with pytest.raises(DataError, match="'three'"):
        open_dataset("digits", [name for name in DIGIT_NAMES if name != "three"], preprocessing)


def counting(folder, preprocessing, budget):
    """A dataset that counts how often each picture is decoded."""
    loads: list[str] = []

    def counted(picture):
        def load():
            loads.append(picture.name)
            return picture.load()

        return replace(picture, load=load)

    whole = open_dataset(str(folder), ["cat", "dog"], preprocessing)
    return Dataset([counted(p) for p in whole.pictures], whole.labels, preprocessing, budget), loads


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (PIXELS - 1, 0), (PIXELS, 1), (3 * PIXELS + 5, 3), (10**9, 5)])
def test_as_many_pictures_are_kept_in_memory_as_the_budget_holds(folder, preprocessing, budget, kept):
    data, loads = counting(folder, preprocessing, budget)
    first = data.pixels(range(5))
    assert len(loads) == 5
    second = data.pixels(range(5))
    assert len(loads) == 5 + (5 - kept)
    assert np.array_equal(first, second)


def test_a_pictures_domain_is_the_folder_in_its_class_folder(tmp_path):
    for place in ("cat/photo/1.png", "cat/sketch/old/2.png", "dog/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    found = find_pictures(str(tmp_path))
    assert [(picture.label, picture.domain) for picture in found] == [("cat", "photo"), ("cat", "sketch"), ("dog", "")]
