"""A file is there whole, or as it was; where output may go is told before the work."""

import errno
import os
from pathlib import Path

import pytest

from resdet.errors import UserError
from resdet.files import (
    check_output,
    check_outputs,
    make_output_folder,
    remove_temporary,
    write_text,
    written_whole,
)


def fail_half_way(path: Path) -> None:
    with written_whole(path) as temporary:
        temporary.write_text("half of the new")
        raise OSError("disk full")


def test_a_failure_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with written_whole(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its directory does not exist"), written_whole(tmp_path / "no" / "file"):
        pass


def test_an_error_of_the_disk_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(OSError) as caught, written_whole(path):  # noqa: PT011 - its attributes are checked below
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_a_name_of_the_greatest_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    write_text(path, "text")
    assert path.read_text() == "text"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {".lock", ".hidden.pt", "last.pt", "." + "0" * 31 + ".last.pt"}
    for name in kept | {"." + "0123456789abcdef" * 2 + ".last.pt", "." + "f" * 32 + ".tmp.pt"}:
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_output_is_refused_before_the_work_where_it_cannot_be_written(tmp_path: Path) -> None:
    source, folder = tmp_path / "input.json", tmp_path / "folder"
    source.write_text("input")
    folder.mkdir()
    (tmp_path / "link.json").symlink_to(source)
    check_output(tmp_path / "new.json", [source, tmp_path / "missing"])
    check_output(source)  # an old output may be replaced
    for path, message in (
        (source, "would overwrite an input"),
        (tmp_path / "link.json", "would overwrite an input"),
        (folder, "must be a file, but a folder has this name"),
        (Path(os.devnull), "must be a file, but a device or a pipe has this name"),
        (tmp_path / "no" / "file", "its directory does not exist"),
        (source / "file", "Not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(path, [source])
    assert source.read_text() == "input"


def test_several_outputs_are_checked_against_all_inputs(tmp_path: Path) -> None:
    source = tmp_path / "input.png"
    source.write_text("input")
    os.link(source, tmp_path / "hard.png")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    check_outputs([tmp_path / "a.png", tmp_path / "b.png"], [source])
    for name in ("input.png", "hard.png", "folder/input.png"):
        with pytest.raises(UserError, match=f"{name}: the output would overwrite an input of this command"):
            check_outputs([tmp_path / "a.png", Path(f"{tmp_path}/{name}")], [tmp_path / "other.png", source])


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_file_is_never_replaced_by_one(kind: str, tmp_path: Path) -> None:
    path = Path(os.devnull) if kind == "device" else tmp_path / kind
    if kind != "device":
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    before = path.stat().st_mode
    with pytest.raises(UserError, match="the output must be a file, but a"):
        write_text(path, "text")
    assert path.stat().st_mode == before
    assert not [child for child in tmp_path.iterdir() if child != path]


def test_a_name_that_is_no_utf8_is_written_as_an_escape(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", os.fsdecode(b"caf\xe9.jpg"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "caf\\udce9.jpg"


def test_a_folder_for_output_is_made_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    make_output_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    for path, message in (
        (file, "a file has this name"),
        (file / "below", "a file has this name"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            make_output_folder(path)
