"""A file is there whole, or as it was."""

from pathlib import Path

import pytest

from resdet.errors import UserError
from resdet.files import written_whole


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
