import copy
import gc
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from resdet.data.annotations import MIN_TRAINABLE_SIDE, AnnotationTable, FileNames
from resdet.data.sharing import memory_of
from resdet.errors import DataError
from resdet.types import Category

CLASSES = (Category(1, 10, "cat"), Category(2, 20, "dog"), Category(3, 30, "bird"))


def table(boxes_per_image, *, labels=None, crowd=None, difficult=None, size=(40, 60), categories=CLASSES):
    """A table of images of one size, each with the given xywh boxes."""
    boxes = np.array([box for image in boxes_per_image for box in image], dtype=np.float64).reshape(-1, 4)
    num_images, num_boxes = len(boxes_per_image), len(boxes)
    return AnnotationTable(
        name="test",
        categories=categories,
        image_ids=np.arange(100, 100 + num_images),
        file_names=np.array([f"{i}.png" for i in range(num_images)]),
        sizes=np.tile(np.array([size], dtype=np.int32), (num_images, 1)),
        offsets=np.concatenate([[0], np.cumsum([len(image) for image in boxes_per_image])]).astype(np.int64),
        boxes_xywh=boxes,
        labels=np.ones(num_boxes, dtype=np.int64) if labels is None else np.array(labels),
        area=boxes[:, 2] * boxes[:, 3],
        crowd=np.zeros(num_boxes, dtype=bool) if crowd is None else np.array(crowd),
        difficult=np.zeros(num_boxes, dtype=bool) if difficult is None else np.array(difficult),
        annotation_ids=np.arange(1000, 1000 + num_boxes),
    )


def test_boxes_are_clipped_to_their_image():
    boxes = table([[(-5, -5, 20, 20)], [(50, 30, 100, 100)]]).boxes_in_image()
    assert boxes.tolist() == [[0, 0, 15, 15], [50, 30, 60, 40]]


@pytest.mark.parametrize(
    ("box", "trained"),
    [
        ((1, 1, 5, 5), True),
        ((1, 1, MIN_TRAINABLE_SIDE * 2, 5), True),
        ((1, 1, MIN_TRAINABLE_SIDE / 2, 5), False),
        ((1, 1, 0, 5), False),
        ((1, 1, -3, 5), False),
        ((70, 1, 5, 5), False),  # beside its image
        ((59.95, 1, 5, 5), False),  # only a sliver inside
        ((float("nan"), 1, 5, 5), False),
        ((1, 1, float("inf"), 5), False),
    ],
)
def test_only_boxes_with_extent_inside_the_image_are_trained_on(box, trained):
    assert table([[box]]).trainable().tolist() == [trained]


def test_crowd_is_never_and_difficult_only_on_demand_trained_on():
    boxes = table([[(1, 1, 5, 5)] * 3], crowd=[True, False, False], difficult=[False, True, False])
    assert boxes.trainable().tolist() == [False, False, True]
    assert boxes.trainable(use_difficult=True).tolist() == [False, True, True]


def test_objects_of_an_image_are_counted_without_crowds():
    boxes = (0, 0, 5, 5)
    counts = table([[], [boxes] * 3, [boxes]], crowd=[False, True, False, True]).objects_per_image()
    assert counts.tolist() == [0, 2, 0]
    assert table([]).objects_per_image().tolist() == []


def test_selected_images_bring_their_own_boxes():
    whole = table([[(0, 0, 1, 1)], [], [(0, 0, 2, 2), (0, 0, 3, 3)]], labels=[1, 2, 3])
    part = whole.select_images(np.array([2, 1]))
    assert part.image_ids.tolist() == [102, 101]
    assert part.boxes_xywh[part.rows(0)].tolist() == [[0, 0, 2, 2], [0, 0, 3, 3]]
    assert part.labels[part.rows(0)].tolist() == [2, 3]
    assert part.rows(1) == slice(2, 2)


def test_selected_classes_are_relabelled_in_the_given_order():
    whole = table([[(0, 0, 1, 1), (0, 0, 2, 2)], [(0, 0, 3, 3)]], labels=[1, 2, 3])
    part = whole.select_classes(["bird", "cat"])
    assert part.categories == (Category(1, 30, "bird"), Category(2, 10, "cat"))
    assert part.num_images == 2
    assert part.labels.tolist() == [2, 1]
    assert part.boxes_xywh[:, 2].tolist() == [1, 3]
    assert part.offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [["cow"], ["cat", "cat"], ["cat", "Dog"], ["cat", "d og"], ["cow", "bull"]])
def test_unknown_misspelt_or_repeated_classes_are_refused(names):
    whole = table([[(0, 0, 1, 1)]], categories=(Category(1, 10, "cat"), Category(2, 20, "dog")))
    with pytest.raises(DataError, match="classes must name each class once"):
        whole.select_classes(names)


def test_a_named_class_may_be_empty():
    whole = table(
        [[(0, 0, 1, 1), (0, 0, 2, 2)]], labels=[1, 2], categories=(Category(1, 9, "cat"), Category(2, 7, "dog"))
    )
    part = whole.select_classes(["dog", "cow", "cat", "bull"])
    assert [(one.label, one.name) for one in part.categories] == [(1, "dog"), (2, "cow"), (3, "cat"), (4, "bull")]
    assert len({one.category_id for one in part.categories}) == 4
    assert (part.categories[0].category_id, part.categories[2].category_id) == (7, 9)
    assert part.labels.tolist() == [3, 1]
    assert part.notes == ("the named classes ['cow', 'bull'] are not in it; its classes are ['cat', 'dog']",)


def test_added_classes_come_last_and_known_ones_stay():
    whole = table([[(0, 0, 1, 1)]], categories=(Category(1, 9, "cat"), Category(2, 7, "dog")))
    assert whole.add_classes([Category(5, 1, "dog"), Category(2, 2, "cat")]) is whole
    more = whole.add_classes([Category(1, 7, "owl"), Category(2, 9, "cat"), Category(3, 3, "cow")])
    assert more.categories == (*whole.categories, Category(3, 10, "owl"), Category(4, 3, "cow"))
    assert more.labels is whole.labels


def test_a_table_gets_the_classes_of_a_model():
    whole = table([[(0, 0, 1, 1)]], labels=[3])
    cat, dog, bird = whole.categories
    cow = Category(1, 20, "cow")
    assert whole.with_classes_of(whole.categories[::-1]) is whole
    # Classes without boxes go where the model does not have them, those with boxes never.
    assert [one.name for one in whole.with_classes_of([bird, cow]).categories] == ["bird", "cow"]
    assert whole.with_classes_of([bird, cow]).labels.tolist() == [1]
    assert whole.with_classes_of([cat, dog, cow]) is whole


def random_table(num_images, seed=0):
    """Some images without boxes, some boxes outside their image, thin or not finite."""
    rng = np.random.default_rng(seed)
    values = [0, 0.05, 1, 70, np.nan, np.inf]
    images = []
    for _ in range(num_images):
        boxes = rng.uniform(-10, 60, size=(rng.integers(0, 6), 4)).round(2)
        odd = rng.random(boxes.shape) < 0.05
        boxes[odd] = rng.choice(values, size=int(odd.sum()))
        images.append(boxes.tolist())
    num_boxes = sum(map(len, images))
    flags = {name: rng.random(num_boxes) < 0.2 for name in ("crowd", "difficult")}
    return table(images, labels=rng.integers(1, 4, size=num_boxes), **flags)


def test_one_image_at_a_time_gives_the_rows_of_the_whole():
    whole = random_table(200)
    boxes, sound = (np.concatenate(parts) for parts in zip(*map(whole.boxes_of, range(200)), strict=True))
    assert boxes.dtype == np.float32
    assert np.array_equal(boxes, whole.boxes_in_image().astype(np.float32), equal_nan=True)
    assert np.array_equal(sound & ~whole.crowd, whole.trainable(use_difficult=True))
    assert not sound.all()


def test_images_in_a_row_are_views(contents):
    whole = random_table(50)
    part = whole.select_images(np.arange(10, 30))
    for name in ("image_ids", "sizes", "boxes_xywh", "labels", "area", "crowd", "difficult", "annotation_ids"):
        assert np.shares_memory(getattr(part, name), getattr(whole, name))
    assert part.offsets[0] == 0
    # The same images in two runs are gathered: the same table, in memory of its own.
    gathered = whole.select_images(np.r_[20:30, 10:20]).select_images(np.r_[10:20, 0:10])
    assert not np.shares_memory(gathered.boxes_xywh, whole.boxes_xywh)
    assert contents(gathered) == contents(part)
    assert np.shares_memory(gathered.file_names.to_arrays()[0], whole.file_names.to_arrays()[0])


def test_no_images_and_images_counted_from_the_end_can_be_selected():
    whole = random_table(10)
    assert whole.select_images(np.zeros(0, dtype=np.int64)).num_images == 0
    assert whole.select_images(np.array([-2, -1, 0])).image_ids.tolist() == [108, 109, 100]


def test_a_class_filter_shares_the_images_and_a_mere_change_of_order_the_boxes():
    whole = random_table(50)
    part = whole.select_classes(["dog"])
    for name in ("image_ids", "sizes"):
        assert getattr(part, name) is getattr(whole, name)
    assert part.file_names is whole.file_names
    turned = whole.select_classes(["dog", "bird", "cat"])
    for name in ("boxes_xywh", "area", "crowd", "difficult", "annotation_ids"):
        assert getattr(turned, name) is getattr(whole, name)


def test_file_names_are_texts_without_an_object_each():
    names = ["a.jpg", "", "\u00fcber/\u6f22.png", "b.jpg", "half \udcff"]
    stored = FileNames(names)
    assert (len(stored), stored.tolist(), list(stored)) == (5, names, names)
    assert (stored[2], stored[-1], stored[np.int64(0)]) == (names[2], names[-1], "a.jpg")
    assert stored[1:4].tolist() == names[1:4]
    assert stored[np.array([3, 0])][1:].tolist() == ["a.jpg"]
    assert stored[np.array([True, False, False, False, True])].tolist() == [names[0], names[4]]
    assert "b.jpg" in stored
    assert FileNames([]).tolist() == []
    with pytest.raises(IndexError):
        stored[5]


def test_ordinary_pickles_and_copies_hold_the_arrays(contents):
    whole = random_table(3000)
    for again in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):
        assert contents(again) == contents(whole)
        assert memory_of(again.boxes_xywh) is None
        again.boxes_xywh[0] = 1


def inode_behind(array):
    """The inode of the memory in which an array lies, as the kernel tells it; None for memory of this process alone."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, inode, *_ = line.split()
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return int(inode) or None
    raise AssertionError(f"nothing is mapped at {address:#x}")


def is_mapped(inode):
    return any(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


def test_sent_to_spawned_workers_it_is_moved_once_and_only_named(contents):
    whole = random_table(3000)
    expected = contents(whole)
    first, second = ForkingPickler.dumps(whole), ForkingPickler.dumps(whole)
    assert len(first) < 10_000 < whole.boxes_xywh.nbytes
    assert contents(whole) == expected
    received = [pickle.loads(sent) for sent in (first, second)]
    for again in received:
        assert contents(again) == expected
    (inode,) = {inode_behind(each.boxes_xywh) for each in (whole, *received)}
    assert is_mapped(inode)
    del whole
    assert contents(received[0]) == expected
    for again in received:
        with pytest.raises(ValueError, match="read-only"):
            again.boxes_xywh[0] = 1
    del again, received
    gc.collect()
    assert not is_mapped(inode)
    assert not [path for path in Path("/dev/shm").iterdir() if path.stat().st_ino == inode]


def test_what_is_moved_is_still_whole_in_ordinary_pickles(contents):
    whole = random_table(3000)
    ForkingPickler.dumps(whole)
    assert memory_of(whole.boxes_xywh) is not None
    pickled = pickle.dumps(whole)
    expected = contents(whole)
    del whole
    assert contents(pickle.loads(pickled)) == expected


def test_small_tables_are_sent_as_they_are(contents):
    whole = random_table(5)
    assert contents(pickle.loads(ForkingPickler.dumps(whole))) == contents(whole)
    assert memory_of(whole.boxes_xywh) is None


class Items:
    """What a data loader's worker is given."""

    def __init__(self, whole):
        self.table = whole

    def __len__(self):
        return self.table.num_images

    def __getitem__(self, index):
        boxes, _ = self.table.boxes_of(index)
        return index, float(np.nansum(boxes)), self.table.file_names[index], inode_behind(self.table.boxes_xywh)


def as_it_is(items):
    return items


@pytest.mark.parametrize(
    "start_method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_workers_see_the_same_table_however_they_are_started(start_method):
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start_method}")
    whole = random_table(300)
    expected = [Items(whole)[index][:3] for index in range(300)]
    loader = DataLoader(
        Items(whole),
        batch_size=50,
        num_workers=2 if start_method == "fork" else 1,
        collate_fn=as_it_is,
        multiprocessing_context=start_method,
    )
    items = [item for batch in loader for item in batch]
    assert [item[:3] for item in items] == expected
    files = {item[3] for item in items}
    assert files == {inode_behind(whole.boxes_xywh)}
    assert (None in files) == (start_method == "fork")
