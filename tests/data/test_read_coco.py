import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from benchmarks.coco_json import write_coco_json
from hypothesis import HealthCheck, given, settings, strategies as st

from resdet.data import coco
from resdet.data.coco import read_coco
from resdet.errors import DataError
from resdet.types import Category


def small():
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 3, "file_name": "sub/a.jpg", "height": 50, "width": 30},
            {"id": 5, "file_name": "empty.jpg", "height": 10, "width": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1.13, 2.27, 3.1, 4.7], "area": 5.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 5]},
            {"id": 4, "image_id": 3, "category_id": 2, "bbox": [4, 4, 0, 9], "area": 0, "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 2, "name": "cat"}],
    }


def write(tmp_path, data):
    path = tmp_path / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def assert_same_as_pycocotools(table, path):
    """Every number of the table is the one that pycocotools reads."""
    from pycocotools.coco import COCO

    reference = COCO(str(path))
    assert sorted(table.image_ids.tolist()) == sorted(reference.getImgIds())
    assert [c.category_id for c in table.categories] == sorted(reference.getCatIds())
    category_id = {c.label: c.category_id for c in table.categories}
    for index, image_id in enumerate(table.image_ids.tolist()):
        image = reference.imgs[image_id]
        assert (table.file_names[index], *table.sizes[index]) == (image["file_name"], image["height"], image["width"])
        rows = table.rows(index)
        objects = reference.imgToAnns[image_id]
        assert table.boxes_xywh[rows].tolist() == [o["bbox"] for o in objects]
        assert table.area[rows].tolist() == [o["area"] for o in objects]
        assert table.crowd[rows].tolist() == [bool(o["iscrowd"]) for o in objects]
        assert table.annotation_ids[rows].tolist() == [o["id"] for o in objects]
        assert [category_id[label] for label in table.labels[rows].tolist()] == [o["category_id"] for o in objects]


@pytest.mark.parametrize("part", ["train2017", "val2017"])
def test_real_coco_gives_the_numbers_of_pycocotools(assets, part):
    path = assets / "tiny_coco" / "annotations" / f"instances_{part}.json"
    assert_same_as_pycocotools(read_coco(path), path)


def test_one_changed_digit_is_noticed_by_the_comparison(assets):
    path = assets / "tiny_coco" / "annotations" / "instances_val2017.json"
    table = read_coco(path)
    boxes_xywh = table.boxes_xywh.copy()
    boxes_xywh[17, 2] = np.nextafter(boxes_xywh[17, 2], 1e9)
    table = replace(table, boxes_xywh=boxes_xywh)
    with pytest.raises(AssertionError):
        assert_same_as_pycocotools(table, path)


def test_labels_follow_category_ids_and_boxes_their_images(tmp_path):
    table = read_coco(write(tmp_path, small()))
    assert table.categories == (Category(1, 2, "cat"), Category(2, 9, "zebra"))
    assert table.image_ids.tolist() == [7, 3, 5]
    assert table.sizes.tolist() == [[40, 60], [50, 30], [10, 10]]
    assert table.offsets.tolist() == [0, 1, 3, 3]
    assert table.labels.tolist() == [1, 2, 1]
    assert table.boxes_xywh[1].tolist() == [1.13, 2.27, 3.1, 4.7]


def test_missing_area_and_crowd_have_defaults_and_degenerate_boxes_stay(tmp_path):
    table = read_coco(write(tmp_path, small()))
    assert table.area.tolist() == [30, 5.5, 0]
    assert table.crowd.tolist() == [False, False, True]
    assert table.boxes_xywh[2].tolist() == [4, 4, 0, 9]
    assert table.trainable().tolist() == [True, True, False]


def test_no_python_object_per_box(tmp_path):
    arrays = read_coco(write(tmp_path, small())).to_arrays()
    assert len(arrays) == 12
    assert all(array.dtype.kind in "iufb" for array in arrays.values())


def test_without_any_annotation_the_images_remain(tmp_path):
    data = small()
    data["annotations"] = []
    table = read_coco(write(tmp_path, data))
    assert (table.num_images, table.num_boxes, table.boxes_xywh.shape) == (3, 0, (0, 4))


def test_classes_select_and_order(tmp_path):
    table = read_coco(write(tmp_path, small()), classes=["zebra"])
    assert table.categories == (Category(1, 9, "zebra"),)
    assert table.annotation_ids.tolist() == [1]
    assert table.num_images == 3


def test_numbers_that_other_languages_write(tmp_path):
    data = small()
    data["images"][0]["width"] = 60.0
    data["annotations"][0].update(iscrowd=None, area=None)
    table = read_coco(write(tmp_path, data))
    assert table.sizes[0].tolist() == [40, 60]
    assert table.area[1] == pytest.approx(3.1 * 4.7, rel=1e-15)  # one multiplication in float64


def change(section, position, **values):
    def apply(data):
        for key, value in values.items():
            if value is KeyError:
                del data[section][position][key]
            else:
                data[section][position][key] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("images", 1, id=7), "image id 7 is given 2 times"),
        (change("images", 1, id="x"), "image number 2: id must be an integer, got 'x'"),
        (change("images", 1, id=KeyError), "image number 2: id must be an integer, got nothing"),
        (change("images", 1, width=KeyError), "image 3: width must be a whole number of pixels > 0, got nothing"),
        (change("images", 1, height=0), "image 3: height must be a whole number of pixels > 0, got 0"),
        (change("images", 1, height=50.5), "image 3: height must be a whole number of pixels > 0, got 50.5"),
        (change("images", 1, file_name=KeyError), "image 3: file_name must be a string, got nothing"),
        (change("categories", 1, id=9), "category id 9 is given 2 times"),
        (change("categories", 1, name="zebra"), "categories 2 and 9 have the same name 'zebra'"),
        (change("categories", 1, name=KeyError), "category 2: name must be a string, got nothing"),
        (change("annotations", 1, id=1), "annotation id 1 is given 2 times"),
        (change("annotations", 1, image_id=99), "annotation 2: image_id 99 is not among its 'images'"),
        (change("annotations", 1, image_id=KeyError), "annotation 2: image_id must be an integer, got nothing"),
        (change("annotations", 1, category_id=1), "annotation 2: category_id 1 is not among its 'categories'"),
        (change("annotations", 1, category_id=95), "annotation 2: category_id 95 is not among its 'categories'"),
        (change("annotations", 1, bbox=KeyError), "annotation 2 of image 7: bbox must be 4 finite numbers"),
        (change("annotations", 1, bbox=[1, 2, 3]), r"annotation 2 of image 7: bbox must be .* got \[1, 2, 3\]"),
        (change("annotations", 1, bbox=["1", "2", "3", "4"]), "annotation 2 of image 7: bbox must be 4 finite"),
        (change("annotations", 1, bbox=[1, 2, None, 4]), "annotation 2 of image 7: bbox must be 4 finite numbers"),
        (change("annotations", 1, bbox=[1, 2, float("nan"), 4]), "annotation 2 of image 7: bbox must be 4 finite"),
        (change("annotations", 1, iscrowd=2), "annotation 2: iscrowd must be 0 or 1, got 2"),
        (change("annotations", 1, area="big"), "annotation 2: area must be a finite number, got 'big'"),
        (lambda data: data.pop("annotations"), "no 'annotations'.*image_info"),
        (lambda data: data.pop("categories"), "no 'categories'.*captions"),
        (lambda data: data.update(images={}), "'images' must be a list"),
        (lambda data: data.update(images=[]), "'images' is empty"),
        (lambda data: data.update(annotations=[3]), r"'annotations'\[0\] must be an object, got 3"),
    ],
)
def test_damage_is_named_with_file_and_id(tmp_path, damage, message):
    data = copy.deepcopy(small())
    damage(data)
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not a json file, or cut short \(0 bytes\)"),
        ('{"images": [', "not a json file, or cut short"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]', "these are detection results"),
        ("[]", "got a json list"),
        ("3", "got a json int"),
        ('{"image_id": 1}', r"no 'images'; its keys are \['image_id'\]"),
    ],
)
def test_other_files_are_told_apart(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_coco(write(tmp_path, text))


def test_a_missing_file_says_how_to_get_coco(tmp_path):
    with pytest.raises(DataError, match=r"no such annotation file.*val2017\.zip and annotations_trainval2017\.zip"):
        read_coco(tmp_path / "instances_val2017.json")
    with pytest.raises(DataError, match="got a folder"):
        read_coco(tmp_path)


def test_several_problems_are_counted_and_the_first_is_named(tmp_path):
    data = small()
    data["annotations"][0]["image_id"] = "x"
    data["images"][2]["width"] = -1
    message = r"image 5: width must be .* got -1 \(and 1 more: `resdet check` lists them\); "
    with pytest.raises(DataError, match=message):
        read_coco(write(tmp_path, data))


def both_ways(path):
    """What typed decoding gives (None where it will not decide) and what the rules give (an error or a table)."""
    plain = coco._read_plain(path.read_bytes())
    try:
        by_rules = coco._to_table(coco._read_any(path), path)
    except DataError as error:
        by_rules = error
    return None if plain is None else coco._to_table(plain, path), by_rules


def test_a_sound_file_of_any_size_is_decoded_by_types_and_means_the_same(tmp_path, contents):
    path = tmp_path / "instances.json"
    write_coco_json(path, num_images=300, num_boxes=2000, seed=1)
    plain, by_rules = both_ways(path)
    assert plain.num_boxes == 2000
    assert contents(plain) == contents(by_rules)
    assert_same_as_pycocotools(plain, path)


numbers = st.one_of(
    st.integers(-5, 5),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(-100, 100),
    st.sampled_from([640.0, 1e22, 5e-324, 2.0**53, 0.1 + 0.2, -0.0]),
)
odd = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=3), st.just([]), st.just({"a": [1]}))
changes = st.lists(
    st.tuples(
        st.sampled_from(["images", "annotations", "categories"]),
        st.integers(0, 2),
        st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "height", "file_name", "name"]),
        st.one_of(odd, st.lists(numbers, min_size=4, max_size=4), st.just(KeyError)),
    ),
    max_size=2,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes)
def test_odd_values_never_mean_something_else_to_typed_decoding(tmp_path, contents, changes):
    data = small()
    for section, position, key, value in changes:
        record = data[section][position % len(data[section])]
        if value is KeyError:
            record.pop(key, None)
        else:
            record[key] = value
    plain, by_rules = both_ways(write(tmp_path, data))
    if plain is not None:
        assert not isinstance(by_rules, DataError), by_rules
        assert contents(plain) == contents(by_rules)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=2))
def test_odd_bytes_never_mean_something_else_to_typed_decoding(tmp_path, contents, cuts):
    data = small()
    data["info"] = {"note": "not read", "by": ["\u00e9\ud83d\ude00", 1.5e3, True, None]}
    for record in data["annotations"]:
        record["segmentation"] = [[1, 2.5, 3e2, -4]]
    text = json.dumps(data).encode()
    for start, length, inserted in cuts:
        text = text[: start % len(text)] + inserted + text[start % len(text) + length :]
    path = tmp_path / "instances.json"
    path.write_bytes(text)
    plain, by_rules = both_ways(path)
    if plain is not None:
        assert not isinstance(by_rules, DataError), by_rules
        assert contents(plain) == contents(by_rules)


@pytest.mark.parametrize("where", ["info", "file_name"])
def test_text_that_is_not_utf8_is_refused_even_where_it_is_not_used(tmp_path, where):
    data = small()
    data["info"] = "#"
    data["images"][0]["file_name"] = "@.jpg"
    mark = {"info": b"#", "file_name": b"@"}[where]
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(data).encode().replace(mark, b"\xff"))
    with pytest.raises(DataError, match=r"not a json file.*can't decode byte 0xff"):
        read_coco(path)


def test_other_alphabets_are_read(tmp_path):
    data = small()
    data["images"][0]["file_name"] = "\u00fcn\u6f22.jpg"
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    plain, _ = both_ways(path)
    assert plain.file_names.tolist() == ["\u00fcn\u6f22.jpg", "sub/a.jpg", "empty.jpg"]
