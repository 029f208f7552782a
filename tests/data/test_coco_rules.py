import copy
import json
import random

import pytest

from resdet.check.kinds import KINDS
from resdet.data.coco_rules import load_records, record_problems
from resdet.errors import DataError


def small():
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "height": 40, "width": 60},
            {"id": 3, "file_name": "a.jpg", "height": 50, "width": 30},
            {"id": 5, "file_name": "c.jpg", "height": 10, "width": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1.5, 2, 3, 4], "area": 5.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 6, 5]},
            {"id": 4, "image_id": 3, "category_id": 2, "bbox": [4, 4, 0, 9], "area": 0, "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 2, "name": "cat"}],
    }


def problems_of(data, tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return list(record_problems(load_records(path)))


def test_a_sound_file_has_no_problems(tmp_path):
    assert problems_of(small(), tmp_path) == []


def test_a_sound_real_file_has_no_problems(assets):
    path = assets / "tiny_coco" / "annotations" / "instances_val2017.json"
    assert list(record_problems(load_records(path))) == []


# (section, position, key, value, kind, message, image ids, annotation ids)
DAMAGES = [
    ("images", 1, "id", "x", "bad_image_id", "image number 2: id must be an integer, got 'x'", (), ()),
    ("images", 1, "id", 7, "duplicate_image_id", "image id 7 is given 2 times", (7,), ()),
    ("images", 1, "width", None, "bad_image_size", "image 3: width must be a whole number", (3,), ()),
    (
        "images",
        1,
        "height",
        -1,
        "bad_image_size",
        "image 3: height must be a whole number of pixels > 0, got -1",
        (3,),
        (),
    ),
    ("images", 1, "file_name", 5, "bad_file_name", "image 3: file_name must be a string, got 5", (3,), ()),
    (
        "images",
        1,
        "file_name",
        "a\0",
        "bad_file_name",
        r"image 3: file_name must be a name that files can have",
        (3,),
        (),
    ),
    ("images", 1, "file_name", "\ud800", "bad_file_name", r"file_name must be a name that files can have", (3,), ()),
    ("categories", 1, "id", 9, "duplicate_category_id", "category id 9 is given 2 times", (), ()),
    ("categories", 1, "id", None, "bad_category_id", "category number 2: id must be an integer, got nothing", (), ()),
    ("categories", 1, "name", "", "bad_category_name", "category 2: name must be a string, got ''", (), ()),
    ("categories", 1, "name", "zebra", "duplicate_category_name", "categories 2 and 9 have the same name", (), ()),
    ("annotations", 1, "id", 1, "duplicate_annotation_id", "annotation id 1 is given 2 times", (), (1,)),
    ("annotations", 1, "id", 1.5, "bad_annotation_id", "annotation number 2: id must be an integer, got 1.5", (), ()),
    (
        "annotations",
        1,
        "image_id",
        99,
        "unknown_image",
        "annotation 2: image_id 99 is not among its 'images'",
        (99,),
        (2,),
    ),
    ("annotations", 1, "image_id", "7", "bad_image_reference", "annotation 2: image_id must be an integer", (), (2,)),
    ("annotations", 1, "category_id", 1, "unknown_category", "category_id 1 is not among its 'categories'", (7,), (2,)),
    ("annotations", 1, "category_id", [], "bad_category_reference", "category_id must be an integer", (7,), (2,)),
    ("annotations", 1, "bbox", [1, 2], "bad_box", r"annotation 2 of image 7: bbox must be .* got \[1, 2\]", (7,), (2,)),
    ("annotations", 1, "bbox", [1, 2, 3, float("nan")], "bad_box", "bbox must be 4 finite numbers", (7,), (2,)),
    ("annotations", 1, "bbox", [1, 2, 3, 10**400], "bad_box", "bbox must be 4 finite numbers", (7,), (2,)),
    ("annotations", 1, "iscrowd", 2, "bad_iscrowd", "annotation 2: iscrowd must be 0 or 1, got 2", (7,), (2,)),
    ("annotations", 1, "area", 10**400, "bad_area", "annotation 2: area must be a finite number, got 1000", (7,), (2,)),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: f"{damage[4]}-{damage[3]!r:.20}")
def test_each_damage_is_one_problem_with_its_ids(tmp_path, damage):
    section, position, key, value, kind, message, image_ids, annotation_ids = damage
    data = small()
    data[section][position][key] = value
    problems = [problem for problem in problems_of(data, tmp_path) if problem.kind == kind]
    (problem,) = problems
    assert KINDS[problem.kind].severity == "error"
    assert (problem.image_ids, problem.annotation_ids) == (image_ids, annotation_ids)
    with pytest.raises(DataError, match=message):
        raise DataError(str(problem))
    assert str(problem).startswith(f"{tmp_path / 'instances.json'}: ")
    assert "\n" not in str(problem)


def test_all_problems_are_given_not_the_first_alone(tmp_path):
    data = small()
    for annotation in data["annotations"]:
        annotation["bbox"] = None
        annotation["category_id"] = 77
    data["images"][0]["width"] = data["images"][2]["height"] = 0
    data["images"].append(3)
    problems = problems_of(data, tmp_path)
    assert [problem.kind for problem in problems] == [
        "not_an_object",
        "bad_image_size",
        "bad_image_size",
        "unknown_category",
        "bad_box",
        "bad_box",
        "bad_box",
    ]
    (unknown,) = (problem for problem in problems if problem.kind == "unknown_category")
    assert unknown.annotation_ids == (1, 2, 4)
    assert unknown.count == 3
    assert unknown.message == "annotation 1: category_id 77 is not among its 'categories' (3 annotations of this kind)"


def test_numbers_beyond_a_float_s_integers_do_not_hide_a_sound_column(tmp_path):
    # Together these have no common NumPy type that keeps both; each alone is an integer.
    data = small()
    data["annotations"][0]["id"], data["annotations"][1]["id"] = 2**53 + 1, 2.0
    assert problems_of(data, tmp_path) == []


JUNK = [None, "x", "3", 0, 1, -3, 2.5, 7, 1.0, [1, 2, 3, 4], [1], {}, float("nan"), 10**30, True, "", [["a"]], 10**400]


def test_no_junk_makes_it_fail(tmp_path):
    rng = random.Random(0)
    found = set()
    for _ in range(300):
        data = copy.deepcopy(small())
        for _ in range(rng.randint(1, 4)):
            section = data[rng.choice(sorted(data))]
            position = rng.randrange(len(section))
            record = section[position]
            if isinstance(record, dict) and record and rng.random() < 0.9:
                record[rng.choice(sorted(record))] = rng.choice(JUNK)
            else:
                section[position] = rng.choice(JUNK)
        found.update(problem.kind for problem in problems_of(data, tmp_path))
    assert len(found) > 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not a json file, or cut short \(0 bytes\)"),
        ('{"images": [', "not a json file, or cut short"),
        ("[" * 100_000, "nested too deeply|not a json file"),
        (f'{{"images": {"1" * 5000}}}', "not a json file.*digits"),
        ("[]", "got a json list"),
        ('{"images": [], "annotations": []}', "no 'categories'.*captions"),
        ('{"images": 3, "annotations": [], "categories": []}', "'images' must be a list, got 3"),
    ],
)
def test_what_is_no_coco_file_is_said_at_once(tmp_path, text, message):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_records(path)
