"""Readers of attributes: small trees in exactly the published formats, whole and with the usual damage.

    pytest tests/test_attributes.py          about 3 s on 2 CPU cores
"""
import os

import numpy as np
import pytest
from PIL import Image

import data
from attributes import SPLITS, open_attributes

CELEBA_NAMES = ["5_o_Clock_Shadow", "Bald", "Young"]
AWA_CLASSES = ["antelope", "grizzly+bear", "killer+whale"]
AWA_MATRIX = [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1]]


def draw(path, number):
    """Write a picture that says its number: red 10 * number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 48), (10 * number, 99, 0)).save(path, quality=95)


def number_of(images, row):
    """Return the number that the picture of a row says, and check its label is the row."""
    batch, labels = images.__getitems__([row])
    assert labels.tolist() == [row] and batch.shape[1] == 3
    return round(batch[0, 0].float().mean().item() / 10)


def celeba(root, lists="", pictures="img_align_celeba", count=20, end="\n", space=" "):
    """CelebA as published: values -1 and 1 in columns, image i has attribute k if bit k of i is set."""
    (root / lists).mkdir(parents=True, exist_ok=True)
    lines = [f"{count}", " ".join(CELEBA_NAMES) + " "]
    for i in range(1, count + 1):
        lines.append(f"{i:06d}.jpg " + space.join(f"{1 if i >> k & 1 else -1:2d}" for k in range(3)))
        draw(root / pictures / f"{i:06d}.jpg", i)
    write(root / lists / "list_attr_celeba.txt", lines, end)
    parts = [f"{i:06d}.jpg {(i > count - 8) + (i > count - 4)}" for i in range(1, count + 1)]
    write(root / ("Eval" if lists == "Anno" else lists) / "list_eval_partition.txt", parts, end)


def deepfashion(root, anno="Anno", pictures="Img/img", unknown=()):
    """DeepFashion as published: attribute names with spaces and a type; image i has attribute i % 3."""
    names = [("a-line", 3), ("abstract chevron print", 1), ("zip-up back", 4)]
    write(root / anno / "list_attr_cloth.txt", ["3", "attribute_name  attribute_type"] +
          [f"{name:<40} {kind}" for name, kind in names])
    files = [f"img/Sheer_Pleated-Front_Blouse/img_{i:08d}.jpg" for i in range(1, 13)]
    lines = ["12", "image_name  attribute_labels"]
    for i, file in enumerate(files, 1):
        values = " ".join(f"{0 if (i, k) in unknown else 1 if i % 3 == k else -1:2d}" for k in range(3))
        lines.append(f"{file:<70} {values} ")
        draw(root / pictures / file[4:], i)
    write(root / anno / "list_attr_img.txt", lines)
    write(root / "Eval" / "list_eval_partition.txt", ["12", "image_name  evaluation_status"] + [
        f"{file:<70} {'train' if i < 6 else 'val' if i < 9 else 'test'}" for i, file in enumerate(files)])


def awa2(root, each=10):
    """AwA2 as published: numbered classes and predicates behind a tab, a matrix of 0 and 1, class folders."""
    write(root / "classes.txt", [f"{i:6d}\t{name}" for i, name in enumerate(AWA_CLASSES, 1)])
    write(root / "predicates.txt", [f"{i:6d}\t{name}" for i, name in
                                    enumerate(["black", "white", "big", "swims"], 1)])
    write(root / "predicate-matrix-binary.txt", [" ".join(map(str, row)) for row in AWA_MATRIX])
    write(root / "trainclasses.txt", AWA_CLASSES[:2])
    write(root / "testclasses.txt", AWA_CLASSES[2:])
    for k, name in enumerate(AWA_CLASSES):
        for i in range(each):
            draw(root / "JPEGImages" / name / f"{name}_1{i + 1:04d}.jpg", 2 * k)


def write(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(lines) + end).encode())


def files_of(found, split):
    return [str(found.splits[split].images.files[row]) for row in found.splits[split].rows]


# the published trees

@pytest.mark.parametrize("lists, pictures", [
    ("", "img_align_celeba"), ("Anno", "Img/img_align_celeba"), ("", "img_align_celeba/img_align_celeba")])
def test_celeba_is_read_in_its_published_layouts(tmp_path, lists, pictures):
    celeba(tmp_path, lists, pictures)
    found = open_attributes(str(tmp_path), 32)
    assert found.names == CELEBA_NAMES and not found.notes and not found.class_names
    assert [len(found.splits[name].rows) for name in SPLITS] == [12, 4, 4]
    assert files_of(found, "val") == [f"{i:06d}.jpg" for i in (13, 14, 15, 16)]
    for split in found.splits.values():
        for row in split.rows:
            number = number_of(split.images, row)
            assert split.attributes[row].tolist() == [number >> k & 1 for k in range(3)]


@pytest.mark.parametrize("anno, pictures", [("Anno", "Img/img"), ("Anno_coarse", "Img/img"), ("", "img")])
def test_deepfashion_is_read_in_its_published_layouts(tmp_path, anno, pictures):
    deepfashion(tmp_path, anno, pictures)
    found = open_attributes(f"{tmp_path}", 32)
    assert found.names == ["shape=a-line", "texture=abstract chevron print", "part=zip-up back"]
    assert [len(found.splits[name].rows) for name in SPLITS] == [6, 3, 3] and not found.notes
    for split in found.splits.values():
        for row in split.rows:
            number = number_of(split.images, row)
            assert split.attributes[row].tolist() == [int(number % 3 == k) for k in range(3)]


def test_unknown_values_of_deepfashion_are_no_positives(tmp_path):
    deepfashion(tmp_path, unknown={(1, 1), (1, 0)})  # its only positive and a negative
    found = open_attributes(str(tmp_path), 32)
    assert found.splits["train"].attributes[0].tolist() == [0, 0, 0]
    assert found.splits["train"].attributes[1].tolist() == [0, 0, 1]


def test_awa2_gives_images_their_class_attributes_and_parts_every_class(tmp_path):
    awa2(tmp_path)
    found = open_attributes(str(tmp_path), 32)
    assert found.names == ["black", "white", "big", "swims"] and found.class_names == AWA_CLASSES
    for name, count in zip(SPLITS, (7, 1, 2)):
        split = found.splits[name]
        assert np.bincount(split.classes[split.rows]).tolist() == [count] * 3
        for row in split.rows:
            k = AWA_CLASSES.index(str(split.images.files[row]).split("/")[0])
            assert split.classes[row] == k and split.attributes[row].tolist() == AWA_MATRIX[k]
            assert number_of(split.images, row) == 2 * k
    everything = sum((files_of(found, name) for name in SPLITS), [])
    assert len(everything) == len({*everything}) == 30
    again = open_attributes(str(tmp_path), 32)
    assert all(files_of(found, name) == files_of(again, name) for name in SPLITS)
    assert files_of(found, "test") != sorted(everything)[-6:]  # drawn, not cut off


def test_attributes_csv_is_read_with_and_without_class_folders(tmp_path):
    lines = ["filename, warm ,round"]
    for i in range(20):
        draw(tmp_path / f"class {i % 2}" / f"Bild ü{i}.JPG", i)
        lines.append(f"class {i % 2}/Bild ü{i}.JPG, {i % 2},{1 if i > 9 else -1} ")
    write(tmp_path / "attributes.csv", ["\ufeff" + lines[0], *lines[1:], ""], "\r\n")
    found = open_attributes(str(tmp_path), 32)
    assert found.names == ["warm", "round"] and found.class_names == ["class 0", "class 1"]
    assert not found.notes
    assert [len(found.splits[name].rows) for name in SPLITS] == [14, 2, 4]
    for split in found.splits.values():
        for row in split.rows:
            number = number_of(split.images, row)
            assert split.attributes[row].tolist() == [number % 2, int(number > 9)]
            assert split.classes[row] == number % 2
    (tmp_path / "attributes.csv").unlink()
    classes = open_attributes(str(tmp_path), 32)
    assert classes.names == [] and classes.class_names == ["class 0", "class 1"]
    assert sorted(files_of(classes, "test")) == sorted(files_of(found, "test"))


def test_embedded_set_has_exact_attributes_and_fits_on_as_many_images_as_asked(monkeypatch):
    monkeypatch.setitem(data.SHAPES_NUM, "val", 30)
    found, shapes = open_attributes("shapes", num_train=40), data.Shapes(50, 0, "train")
    assert [len(found.splits[name].rows) for name in SPLITS] == [40, 10, 30]
    split = found.splits["val"]
    assert split.rows.tolist() == [*range(40, 50)] and found.names == shapes.attribute_names
    batch, rows = split.images.__getitems__([41, 45])
    assert rows.tolist() == [41, 45] and (batch.numpy() == shapes.__getitems__([41, 45])[0].numpy()).all()
    assert (split.attributes[rows] == shapes.attributes[[41, 45]]).all()
    assert (split.classes[rows] == shapes.labels[[41, 45]]).all()


def test_fewer_train_images_are_drawn_by_seed_and_leave_the_other_splits_alone(tmp_path):
    celeba(tmp_path)
    found, other = (open_attributes(str(tmp_path), 32, num_train=5, seed=seed) for seed in (0, 1))
    assert [len(found.splits[name].rows) for name in SPLITS] == [5, 4, 4]
    assert files_of(found, "train") != files_of(other, "train")
    assert {*files_of(found, "train")} <= {*files_of(open_attributes(str(tmp_path), 32), "train")}
    assert files_of(found, "test") == files_of(other, "test")


# the usual damage

def test_line_ends_of_windows_tabs_and_spaces_make_no_difference(tmp_path):
    celeba(tmp_path / "a")
    celeba(tmp_path / "b", end=" \r\n", space="\t ")
    for path in (tmp_path / "b").glob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    a, b = (open_attributes(str(tmp_path / name), 32) for name in "ab")
    for name in SPLITS:
        assert (a.splits[name].attributes == b.splits[name].attributes).all()
        assert files_of(a, name) == files_of(b, name)


def test_a_listed_image_without_file_is_left_out_and_more_than_one_percent_are_an_error(tmp_path):
    celeba(tmp_path)
    (tmp_path / "img_align_celeba" / "000014.jpg").unlink()
    draw(tmp_path / "img_align_celeba" / "999999.jpg", 9)  # and a file that is not listed
    found = open_attributes(str(tmp_path), 32)
    assert [len(found.splits[name].rows) for name in SPLITS] == [12, 3, 4]
    assert any("1 of 20 listed images have no file" in note and "000014.jpg" in note for note in found.notes)
    assert any("1 images" in note and "not listed" in note and "999999.jpg" in note for note in found.notes)
    split = found.splits["test"]
    assert [number_of(split.images, row) for row in split.rows] == [17, 18, 19, 20]  # nothing has moved
    assert split.attributes[split.rows].tolist() == [[i >> k & 1 for k in range(3)] for i in (17, 18, 19, 20)]
    (tmp_path / "img_align_celeba" / "000013.jpg").unlink()
    with pytest.raises(ValueError, match="2 of 20 images have no file below .*000013.jpg; want 1 % or less"):
        open_attributes(str(tmp_path), 32)


def test_an_image_without_split_is_left_out(tmp_path):
    celeba(tmp_path)
    path = tmp_path / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("000002.jpg 0\n", ""))
    found = open_attributes(str(tmp_path), 32)
    assert len(found.splits["train"].rows) == 11 and "have no split" in found.notes[0]


@pytest.mark.parametrize("file, old, new, message", [
    ("list_attr_celeba.txt", "000003.jpg  1", "000003.jpg  2", r"line 5: 3 values .*want 3 of -1, 0 or 1"),
    ("list_attr_celeba.txt", "000003.jpg  1", "000003.jpg", "line 5: 2 values"),
    ("list_attr_celeba.txt", "000003.jpg", "000004.jpg", "line 6: 000004.jpg is listed twice"),
    ("list_attr_celeba.txt", "20\n", "202599\n", "20 entries, its first line says 202599; was it cut off"),
    ("list_attr_celeba.txt", "20\n", "", "want the number of entries on line 1"),
    ("list_eval_partition.txt", "000003.jpg 0", "000003.jpg 3", "line 3: '000003.jpg 3'; want a file and"),
])
def test_damaged_lists_are_refused_with_file_and_line(tmp_path, file, old, new, message):
    celeba(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        open_attributes(str(tmp_path), 32)


def test_lists_that_are_missing_are_named_with_the_places_looked_at(tmp_path):
    celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match="none of list_eval_partition.txt, Anno/list_eval"):
        open_attributes(str(tmp_path), 32)
    with pytest.raises(FileNotFoundError, match="none of classes.txt; want the data set unpacked"):
        open_attributes(f"awa2:{tmp_path}", 32)


def test_awa2_damage_is_noted_or_refused(tmp_path):
    awa2(tmp_path)
    for file in (tmp_path / "JPEGImages" / "antelope").iterdir():
        file.unlink()
    (tmp_path / "JPEGImages" / "antelope").rmdir()
    draw(tmp_path / "JPEGImages" / "unicorn" / "unicorn_10001.jpg", 1)
    found = open_attributes(str(tmp_path), 32)
    assert any("1 of 3 classes have no folder" in note and "antelope" in note for note in found.notes)
    assert any("not listed" in note and "unicorn" in note for note in found.notes)
    assert {*found.splits["test"].classes} == {1, 2}
    write(tmp_path / "predicate-matrix-binary.txt", ["0 1 1 0", "1 0 1 0"])
    with pytest.raises(ValueError, match="2 rows for 3 classes"):
        open_attributes(str(tmp_path), 32)
    write(tmp_path / "predicate-matrix-binary.txt", ["0 1 1", "1 0 1", "1 1 0"])
    with pytest.raises(ValueError, match="line 1: 3 values .* want 4"):
        open_attributes(str(tmp_path), 32)


def test_attribute_type_that_does_not_exist_is_refused(tmp_path):
    deepfashion(tmp_path)
    path = tmp_path / "Anno" / "list_attr_cloth.txt"
    path.write_text(path.read_text().replace(" 4\n", " 7\n"))
    with pytest.raises(ValueError, match="line 5: .*zip-up back.*want a name and a type of 1 to 5"):
        open_attributes(str(tmp_path), 32)


@pytest.mark.parametrize("line, message", [
    ("a.png,0,2", "line 2: 2 values .0 2.; want 2 of -1, 0 or 1"), ("a.png,0", "line 2: 1 values"),
    ("a.png,0,1\na.png,0,1", "line 3: a.png is listed twice"), ("", "want a header"),
    ("b.png,0,1", "no listed image has a file")])
def test_attribute_table_with_gaps_or_other_values_is_refused(tmp_path, line, message):
    draw(tmp_path / "a.png", 1)
    (tmp_path / "attributes.csv").write_text(f"filename,a,b\n{line}\n")
    with pytest.raises(ValueError, match=message):
        open_attributes(str(tmp_path), 32)


def test_folder_of_two_kinds_must_be_told_apart(tmp_path):
    celeba(tmp_path)
    awa2(tmp_path)
    with pytest.raises(ValueError, match="files of celeba and awa2; say which to read: --data celeba:"):
        open_attributes(str(tmp_path), 32)
    assert open_attributes(f"celeba:{tmp_path}", 32).names == CELEBA_NAMES
    assert len(open_attributes(f"awa2:{tmp_path}", 32).names) == 4


def test_folder_without_attributes_or_classes_has_nothing_to_probe(tmp_path):
    draw(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match="nothing to probe; want attributes.csv, a folder per class"):
        open_attributes(str(tmp_path), 32)
    draw(tmp_path / "b.png", 1)
    (tmp_path / "attributes.csv").write_text("filename,a\na.png,0\nb.png,1\n")
    with pytest.raises(ValueError, match="no image in the val split; want more images"):
        open_attributes(str(tmp_path), 32)


def test_hash_says_when_a_picture_has_changed_under_its_name(tmp_path):
    celeba(tmp_path)
    first, same = (open_attributes(str(tmp_path), 32).splits["test"].images.files_hash for _ in range(2))
    picture = tmp_path / "img_align_celeba" / "000003.jpg"
    os.utime(picture, (1, 1))  # another one of as many bytes
    later = open_attributes(str(tmp_path), 32).splits["test"].images.files_hash
    picture.write_bytes(picture.read_bytes() + b" ")
    os.utime(picture, (1, 1))  # another one of the same time
    last = open_attributes(str(tmp_path), 32).splits["test"].images.files_hash
    assert first == same and len({first, later, last}) == 3
