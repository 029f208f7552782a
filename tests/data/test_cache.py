"""The cache of annotation tables: what it gives back, and when it must not."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from benchmarks.coco_json import write_coco_json

from resdet.data import cache, coco, sharing
from resdet.data.coco import read_coco
from resdet.data.sharing import memory_of
from resdet.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder; files of any size and age are kept in it."""
    monkeypatch.setenv("RESDET_CACHE", str(tmp_path / "cache" / "below"))
    monkeypatch.setattr(cache, "SMALLEST", 0)
    monkeypatch.setattr(cache, "_SETTLED_NS", -(10**18))
    return tmp_path / "cache" / "below"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "instances.json"
    write_coco_json(path, num_images=200, num_boxes=1500, seed=0)
    return path


@pytest.fixture
def readings(monkeypatch):
    """A list that grows whenever an annotation file is read rather than found in the cache."""
    seen = []
    read_plain = coco._read_plain
    monkeypatch.setattr(coco, "_read_plain", lambda data: seen.append(len(data)) or read_plain(data))
    return seen


def entry_in(folder):
    [entry] = folder.glob("*.table")
    return entry


def test_the_second_time_the_table_comes_from_the_cache_with_the_same_bits(folder, source, readings, contents, caplog):
    first = read_coco(source)
    with caplog.at_level(logging.INFO, logger="resdet"):
        second = read_coco(source)
    assert len(readings) == 1
    assert "from the cache" in caplog.text
    assert contents(first) == contents(second) == contents(coco._to_table(coco._read_any(source), source))
    assert second.name == str(source)
    assert not list(source.parent.glob(".*"))


def test_both_are_read_only_maps_of_one_file(folder, source):
    for table in (read_coco(source), read_coco(source)):
        assert {memory_of(array).filename for array in table.to_arrays().values()} == {str(entry_in(folder))}
        with pytest.raises(ValueError, match="read-only"):
            table.boxes_xywh[0] = 0


def test_classes_are_selected_after_the_cache(folder, source, readings):
    whole = read_coco(source)
    names = [whole.categories[3].name, whole.categories[1].name]
    assert read_coco(source, classes=names).num_boxes == int(((whole.labels == 4) | (whole.labels == 2)).sum())
    assert read_coco(source).num_boxes == 1500
    assert len(readings) == 1


def flip(position):
    def damage(entry):
        data = bytearray(entry.read_bytes())
        data[position] ^= 0x10
        entry.write_bytes(data)

    return damage


def cut(length):
    return lambda entry: os.truncate(entry, length)


@pytest.mark.parametrize(
    "damage", [flip(0), flip(20), flip(50), flip(100), flip(5000), flip(-1), cut(0), cut(20), cut(60), cut(9999)]
)
def test_a_damaged_cache_is_noticed_said_and_made_anew(folder, source, readings, contents, caplog, damage):
    expected = contents(read_coco(source))
    copy = entry_in(folder).read_bytes()
    damage(entry_in(folder))
    assert contents(read_coco(source)) == expected
    assert len(readings) == 2
    assert f"{source}: its cached table {entry_in(folder)} cannot be used" in caplog.text
    assert entry_in(folder).read_bytes()[:16] == copy[:16]
    assert contents(read_coco(source)) == expected
    assert len(readings) == 2


def test_another_version_is_made_anew(folder, source, readings, monkeypatch):
    read_coco(source)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    read_coco(source)
    read_coco(source)
    assert len(readings) == 2


def rewrite(source, seed):
    """Other contents of the same size under the same inode and mtime."""
    stat = source.stat()
    other = source.with_name("other.json")
    write_coco_json(other, num_images=200, num_boxes=1500, seed=seed)
    data = other.read_bytes().ljust(stat.st_size)
    assert len(data) == stat.st_size
    with source.open("rb+") as file:
        file.write(data)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return stat


def test_changed_contents_are_read_again(folder, source, readings):
    source.write_bytes(source.read_bytes() + b" " * 20_000)
    before = read_coco(source)
    stat = rewrite(source, seed=1)
    assert (source.stat().st_size, source.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = read_coco(source)
    assert len(readings) == 2
    assert before.annotation_ids.tolist() != after.annotation_ids.tolist()


def test_a_change_too_soon_for_the_clock_is_noticed(folder, source, readings, monkeypatch):
    """As if the file system's clock had stood still: every time of the file is as before, its contents are not."""
    source.write_bytes(source.read_bytes() + b" " * 20_000)
    first = cache._State.of(source, os.path.realpath(source))
    for settled, num_readings in ((True, 1), (False, 2)):
        shutil.rmtree(folder, ignore_errors=True)
        readings.clear()
        state = replace(first, settled=settled)
        monkeypatch.setattr(cache._State, "of", classmethod(lambda cls, file, real, state=state: state))
        read_coco(source)
        rewrite(source, seed=5 if settled else 6)
        read_coco(source)
        assert len(readings) == num_readings


def test_a_touched_file_is_known_by_its_contents(folder, source, readings, monkeypatch):
    read_coco(source)
    source.write_bytes(source.read_bytes())
    os.utime(source, (1, 1))
    table = read_coco(source)
    assert len(readings) == 1
    # The new times were noted, so that the contents need not be looked at again.
    monkeypatch.setattr(cache, "_digest", None)
    assert read_coco(source).num_boxes == table.num_boxes == 1500
    assert len(ForkingPickler.dumps(table)) < 10_000, "the file that it maps is the one in the cache"


def test_another_path_is_another_entry(folder, source, readings):
    read_coco(source)
    copy = source.parent / "elsewhere" / source.name
    copy.parent.mkdir()
    shutil.copy2(source, copy)
    read_coco(copy)
    link = source.with_name("link.json")
    link.symlink_to(source)
    assert read_coco(link).name == str(link)
    assert len(readings) == 2
    assert len(list(folder.glob("*.table"))) == 2


def _read_in_child(source, barrier, log):
    read_plain = coco._read_plain

    def read_and_log(data):
        with open(log, "a") as file:
            file.write("read\n")
        time.sleep(0.3)
        return read_plain(data)

    coco._read_plain = read_and_log
    barrier.wait()
    table = read_coco(source)
    with open(log, "a") as file:
        file.write(f"{table.num_boxes} {int(table.annotation_ids.sum())}\n")


@pytest.mark.parametrize("locks", [True, False])
def test_processes_at_once_agree_and_one_reads_for_all(folder, source, tmp_path, monkeypatch, locks):
    if not locks:  # as on file systems without
        monkeypatch.setattr(cache, "one_at_a_time", lambda lock, timeout: nullcontext())
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    children = [context.Process(target=_read_in_child, args=(source, barrier, tmp_path / "log")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    expected = coco._to_table(coco._read_any(source), source)
    assert lines.count("read") == (1 if locks else 3)
    assert lines.count(f"1500 {int(expected.annotation_ids.sum())}") == 3
    assert len(list(folder.glob("*.table"))) == 1


def test_a_folder_that_cannot_be_written_only_costs_time_and_is_said_once(source, folder, monkeypatch, caplog):
    blocked = source / "cache"
    monkeypatch.setenv("RESDET_CACHE", str(blocked))
    assert read_coco(source).num_boxes == 1500
    assert read_coco(source).num_boxes == 1500
    assert caplog.text.count("annotations cannot be cached here") == 1
    assert str(blocked) in caplog.text


def test_a_full_disk_leaves_nothing_behind(source, folder, monkeypatch, caplog):
    def write(path, contents):
        with path.open("wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Path, "write_bytes", write)
    assert read_coco(source).num_boxes == 1500
    assert "No space left on device" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_not_cached(source, folder, monkeypatch, caplog):
    read_plain = coco._read_plain

    def read_and_touch(data):
        os.utime(source, (5, 5))
        return read_plain(data)

    monkeypatch.setattr(coco, "_read_plain", read_and_touch)
    assert read_coco(source).num_boxes == 1500
    assert "changed while it was read" in caplog.text
    assert not list(folder.glob("*.table"))


def test_damaged_annotations_are_never_cached(folder, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DataError, match="'images' is empty"):
        read_coco(path)
    assert not list(folder.glob("*.table"))


def test_small_files_and_those_who_want_none_go_without(folder, source, readings, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 10**9)
    read_coco(source)
    monkeypatch.setattr(cache, "SMALLEST", 0)
    monkeypatch.setenv("RESDET_CACHE", "off")
    read_coco(source)
    assert len(readings) == 2
    assert not folder.exists()


def test_the_folder_follows_the_usual_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("RESDET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "resdet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "resdet"


def test_old_entries_and_leftovers_go_when_one_is_written(folder, source, monkeypatch):
    folder.mkdir(parents=True)
    month_ago = time.time() - 86400 * (cache.MAX_UNUSED_DAYS + 1)
    ages = {"old.table": month_ago, "new.table": time.time() - 60, ".dead.x.table": month_ago, "x.lock": month_ago}
    ages["notes.txt"] = month_ago
    for name, used in ages.items():
        (folder / name).write_bytes(b"1234")
        os.utime(folder / name, (used, used))
    read_coco(source)
    left = {path.name for path in folder.iterdir()}
    assert left >= {"new.table", "notes.txt"}
    assert not left & {"old.table", ".dead.x.table", "x.lock"}

    monkeypatch.setattr(cache, "MAX_TOTAL", 10)
    os.utime(source, (1, 1))
    source.write_bytes(source.read_bytes() + b" ")
    read_coco(source)
    assert [path.suffix for path in folder.glob("*.table")] == [".table"]
    assert read_coco(source).num_boxes == 1500


def test_pickled_it_is_a_name(folder, source, contents):
    table = read_coco(source)
    pickled = ForkingPickler.dumps(table)
    assert len(pickled) < 10_000 < table.boxes_xywh.nbytes
    again = pickle.loads(pickled)
    assert contents(again) == contents(table)
    assert str(memory_of(again.boxes_xywh).filename) == str(entry_in(folder))


def test_pickled_parts_are_names_with_places(folder, source, contents):
    table = read_coco(source).select_images(np.arange(50, 150))
    pickled = ForkingPickler.dumps(table)
    assert len(pickled) < 10_000
    assert contents(pickle.loads(pickled)) == contents(table)


def test_columns_of_another_class_order_are_moved_and_the_others_stay_in_the_file(
    folder, source, contents, monkeypatch
):
    monkeypatch.setattr(sharing, "_SMALL", 0)
    whole = read_coco(source)
    table = whole.select_classes([category.name for category in reversed(whole.categories)])
    expected = contents(table)
    again = pickle.loads(ForkingPickler.dumps(table))
    assert contents(again) == contents(table) == expected
    for sent in (table, again):
        assert isinstance(memory_of(sent.labels), torch.Tensor)
        assert str(memory_of(sent.boxes_xywh).filename) == str(entry_in(folder))


def test_removed_while_in_use_it_still_serves(folder, source, contents):
    table = read_coco(source)
    expected = contents(table)
    pickled = ForkingPickler.dumps(table)
    entry_in(folder).unlink()
    assert contents(table) == expected
    assert contents(pickle.loads(ForkingPickler.dumps(table))) == expected
    with pytest.raises(DataError, match="annotations that another process put here are gone"):
        pickle.loads(pickled)


def test_replaced_while_on_its_way_it_is_refused(folder, source):
    pickled = ForkingPickler.dumps(read_coco(source))
    entry = entry_in(folder)
    flip(30)(entry)
    with pytest.raises(DataError, match="holds other annotations"):
        pickle.loads(pickled)


# ---- forged entries


def forge(entry, change):
    """Write an entry anew after ``change`` has altered its header, facts or columns; its checksum is right again."""
    arrays, facts = cache._map_arrays(entry)
    arrays = {name: array.copy() for name, array in arrays.items()}
    header = change(arrays, facts) or (lambda specs: None)
    text = json.dumps(facts)
    data = cache.save(arrays, {"facts": text, "sha256": cache._checksum(arrays, text)})
    length = int.from_bytes(data[:8], "little")
    specs = json.loads(data[8 : 8 + length])
    header(specs)
    new = json.dumps(specs).encode().ljust(length)
    entry.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
    os.chmod(entry, 0o600)


def column(name, **values):
    """Change what the header says of a column."""
    return lambda arrays, facts: lambda specs: specs[name].update(values)


def entry_of(name, index, value):
    """Change one number of a column."""
    return lambda arrays, facts: arrays[name].__setitem__(index, value)


def replaced(name, make):
    """Change a whole column."""
    return lambda arrays, facts: arrays.update({name: make(arrays[name])}) and None


FORGED = {
    "a column of objects": (column("labels", dtype="O"), "labels is of another type or shape"),
    "a column of another type": (column("labels", dtype="F64"), "labels is of another type or shape"),
    "numbers for flags": (replaced("crowd", lambda a: a.astype(np.int64)), "crowd is of another type or shape"),
    "more dimensions": (column("labels", shape=[750, 2]), "labels is of another type or shape"),
    "boxes of other length": (column("boxes_xywh", shape=[1200, 5]), "boxes_xywh is of another type or shape"),
    "a negative shape": (column("labels", shape=[-1500]), "labels is of another type or shape"),
    "a column beyond the file": (column("labels", data_offsets=[10**9, 10**9 + 12000]), "labels is not where"),
    "a column before the file": (column("labels", data_offsets=[-12000, 0]), "labels is of another type or shape"),
    "a shape larger than its bytes": (column("labels", shape=[2**40]), "labels is not where"),
    "another column": (replaced("more", lambda a: a) and (lambda a, f: a.update(more=a["area"])), "other columns"),
    "a column too short": (replaced("area", lambda a: a[:-1]), "different lengths"),
    "offsets that fall": (entry_of("offsets", 5, 10**12), "do not rise from 0"),
    "offsets that begin later": (entry_of("offsets", 0, 1), "do not rise from 0"),
    "offsets below zero": (entry_of("offsets", 0, -5), "do not rise from 0"),
    "offsets beyond the boxes": (entry_of("offsets", -1, 1501), "do not rise from 0"),
    "a label of the background": (entry_of("labels", 7, 0), "its labels are not in 1..80"),
    "a label beyond the classes": (entry_of("labels", 7, 81), "its labels are not in 1..80"),
    "a size of nothing": (entry_of("sizes", (3, 1), 0), "its sizes or flags are out of range"),
    "a flag that is no truth": (
        lambda arrays, facts: arrays["crowd"].view(np.uint8).__setitem__(0, 7),
        "its sizes or flags are out of range",
    ),
    "a name beyond the characters": (entry_of("file_names.ends", -1, 10**9), "its file names are out of range"),
    "a name before the characters": (entry_of("file_names.starts", 0, -4), "its file names are out of range"),
    "a name that is no text": (entry_of("file_names.utf8", 0, 0xFF), "can't decode byte 0xff"),
    "facts of another kind": (lambda arrays, facts: facts.update(source=[1]), "must be a mapping"),
    "classes of another kind": (lambda arrays, facts: facts.update(categories=[{"label": 1}]), ""),
    "a header nested in itself": (
        lambda arrays, facts: lambda specs: specs.update(a=json.loads("[" * 900 + "]" * 900)),
        "other columns",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_entry_is_no_entry(kind, folder, source, readings, contents, caplog):
    expected = contents(read_coco(source))
    change, message = FORGED[kind]
    forge(entry_in(folder), change)
    assert contents(read_coco(source)) == expected
    assert len(readings) == 2
    assert f"{source}: its cached table {entry_in(folder)} cannot be used (" in caplog.text
    assert message in caplog.text
    assert contents(read_coco(source)) == expected
    assert len(readings) == 2, "it was made again"


def test_a_forger_can_write_what_is_used(folder, source, readings):
    """The twin of the test above: the checksum of a forged entry is right, only its values are refused."""
    read_coco(source)
    forge(entry_in(folder), entry_of("labels", 7, 80))
    assert read_coco(source).labels[7] == 80
    assert len(readings) == 1


def test_a_header_nested_too_deep_to_read(folder, source, readings):
    read_coco(source)
    deep = b"[" * 1_000_000
    entry_in(folder).write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert read_coco(source).num_boxes == 1500
    assert len(readings) == 2


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_an_entry_that_others_can_write_is_no_entry(mode, folder, source, readings, caplog):
    read_coco(source)
    os.chmod(entry_in(folder), mode)
    assert read_coco(source).num_boxes == 1500
    assert len(readings) == 2
    assert "it is not yours alone to write to" in caplog.text
    assert entry_in(folder).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_can_write_holds_no_entries(folder, source, readings, caplog):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    for _ in range(2):
        assert read_coco(source).num_boxes == 1500
    assert len(readings) == 2
    assert not list(folder.iterdir())
    assert (
        f"{folder}: annotations are not cached here, every start reads them anew: the folder must be yours"
        in caplog.text
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["entry", "folder"])
def test_what_belongs_to_others_is_not_used(what, folder, source, readings):
    read_coco(source)
    os.chown(entry_in(folder) if what == "entry" else folder, 12345, -1)
    assert read_coco(source).num_boxes == 1500
    assert len(readings) == 2


def test_a_worker_does_not_map_what_others_can_write(folder, source):
    pickled = ForkingPickler.dumps(read_coco(source))
    os.chmod(entry_in(folder), 0o666)
    with pytest.raises(DataError, match="annotations that another process put here are gone"):
        pickle.loads(pickled)


def test_a_worker_notices_that_the_file_was_cut_short(folder, source):
    pickled = ForkingPickler.dumps(read_coco(source))
    os.truncate(entry_in(folder), entry_in(folder).stat().st_size - 5000)
    with pytest.raises(DataError, match="were cut short"):
        pickle.loads(pickled)


def test_a_cache_is_closed_to_others_whatever_the_umask(folder, source, readings):
    before = os.umask(0)
    try:
        read_coco(source)
        read_coco(source)
    finally:
        os.umask(before)
    assert len(readings) == 1
    assert folder.stat().st_mode & 0o077 == 0
    assert entry_in(folder).stat().st_mode & 0o077 == 0
