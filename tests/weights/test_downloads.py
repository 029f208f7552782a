"""Downloads of weights from a local server that does what servers do: whole, once, in time, or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from local_server import Server

from resdet.errors import WeightsError
from resdet.weights import download
from resdet.weights.files import read_checkpoint
from resdet.weights.source import fetch

pytestmark = pytest.mark.usefixtures("hub")


def weights(path: Path, value: float = 1.0) -> Path:
    torch.save({"w": torch.full((50_000,), value)}, path)
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refusal(url: str) -> str:
    with pytest.raises(WeightsError) as caught:
        fetch(url)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{url}: ")
    return str(caught.value).removeprefix(f"{url}: ")


def test_a_file_with_its_hash_in_its_name_is_downloaded_once_and_known_by_its_name(
    server: tuple[str, Path], hub: Path
) -> None:
    address, root = server
    content = weights(root / "w.pth").read_bytes()
    name = f"r18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (root / name).write_bytes(content)
    for query in ("?download=1", "?download=1", "?token=2"):
        assert fetch(f"{address}/{name}{query}") == hub / name
    assert len(Server.requests) == 1
    assert files_in(hub) == [name]


def test_files_of_one_name_are_known_by_their_urls(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (root / folder).mkdir()
        weights(root / folder / "best.pt", value)
    for _ in range(2):
        for folder, value in (("a", 1.0), ("b", 2.0)):
            path = fetch(f"{address}/{folder}/best.pt")
            assert path.name == "best.pt"
            assert path.is_relative_to(hub)
            assert read_checkpoint(path)["w"][0] == value
    assert Server.requests == ["/a/best.pt", "/b/best.pt"]
    assert fetch(f"{address}/a/best.pt?version=2") != fetch(f"{address}/a/best.pt")
    assert fetch(f"{address}/a/best.pt#fragment") == fetch(f"{address}/a/best.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r18-0123abcd.pth", None, "the download has the SHA-256 "),
        ("cut.pth", None, "the download broke off after "),
        ("page.pth", b"<html>please log in</html>", "the server sent a web page, not a weights file"),
        ("page.pt", b"\n <!DOCTYPE html><p>404", "the server sent a web page, not a weights file"),
        ("text.pth", b"not found", "the download: is damaged, cut short or not a .pth file"),
        ("empty.pth", b"", "the download: is damaged, cut short or not a .pth file"),
        ("list.safetensors", b"[1, 2]", "the download: is damaged, cut short or not a safetensors file"),
        ("absent.pth", None, "cannot be downloaded (HTTP Error 404: File not found)"),
        ("stall.pth", None, "cannot be downloaded (nothing came for 0.5 seconds)"),
        ("late.pth", None, "cannot be downloaded (nothing came for 0.5 seconds)"),
    ],
)
def test_a_bad_download_is_told_and_leaves_nothing_behind(
    name: str,
    content: bytes | None,
    message: str,
    server: tuple[str, Path],
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    address, root = server
    if content is not None:
        (root / name).write_bytes(content)
    elif name != "absent.pth":
        weights(root / name)
    told = refusal(f"{address}/{name}")
    assert told.startswith(message)
    assert f"; put the file of that URL at {hub}" in told
    assert told.endswith(name)
    assert not files_in(hub)
    by_hand = Path(told.rpartition(" at ")[2])
    weights(by_hand.with_suffix(".pt")).rename(by_hand)
    assert fetch(f"{address}/{name}") == by_hand


def test_a_server_that_does_not_exist(hub: Path) -> None:
    assert "cannot be downloaded ([Errno 111] Connection refused); put the file" in refusal("http://127.0.0.1:1/w.pt")


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/w.pt", "data:text/plain,x"])
def test_redirections_to_anything_but_http_are_refused(target: str, server: tuple[str, Path], hub: Path) -> None:
    told = refusal(f"{server[0]}/elsewhere/w.pth?to={target}")
    assert "refused" in told or "redirect" in told.lower()
    assert not files_in(hub)


def test_redirections_to_http_are_followed(server: tuple[str, Path]) -> None:
    address, root = server
    weights(root / "w.pth")
    assert read_checkpoint(fetch(f"{address}/elsewhere/w.pth?to={address}/w.pth"))["w"][0] == 1


def test_a_disk_that_is_full_is_told(server: tuple[str, Path], hub: Path) -> None:
    """A limit on the size of files stands for the disk: the last piece is written in part first, as on a full disk."""
    resource = pytest.importorskip("resource")
    address, root = server
    weights(root / "w.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"w\.pth: cannot be written \(File too large\)"):
            fetch(f"{address}/w.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not files_in(hub)


PROGRAM = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
torch.hub._hub_dir = sys.argv[1]
from resdet.weights.source import fetch
print("begun", flush=True)
print(fetch(sys.argv[2]), flush=True)
"""


def started(tmp_path: Path, url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "hub"), url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_a_stalled_download_at_once_and_the_next_removes_what_is_left(
    number: signal.Signals, server: tuple[str, Path], hub: Path, tmp_path: Path
) -> None:
    address, root = server
    weights(root / "stall.pth")
    process = started(tmp_path, f"{address}/stall.pth")
    while not list(hub.rglob("*.partial.pth")):
        assert process.poll() is None
        time.sleep(0.01)
    begun = time.monotonic()
    os.kill(process.pid, number)
    told = process.communicate(timeout=30)[1]
    assert process.returncode in (-number, 130), told
    assert time.monotonic() - begun < 10, "before the server goes on"
    left = files_in(hub)
    assert left == ([] if number == signal.SIGINT else [".stall.partial.pth"])
    (root / "stall.pth").unlink()
    refusal(f"{address}/stall.pth")
    assert files_in(hub) == []


@pytest.mark.slow
def test_two_processes_at_once_download_once(server: tuple[str, Path], hub: Path, tmp_path: Path) -> None:
    address, root = server
    weights(root / "slow.pth")
    processes = [started(tmp_path, f"{address}/slow.pth") for _ in range(2)]
    told = [process.communicate(timeout=60) for process in processes]
    assert [errors for _, errors in told] == ["", ""]
    assert len({Path(path.strip()) for path, _ in told if Path(path.strip()).is_file()}) == 1
    assert Server.requests == ["/slow.pth"]
    assert files_in(hub) == ["slow.pth"]


def test_what_earlier_versions_left_is_removed(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    content = weights(root / "w.pth").read_bytes()
    name = f"r18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (root / name).write_bytes(content)
    hub.mkdir(parents=True)
    stem, hexadecimal = name.removesuffix(".pth"), "0123456789abcdef" * 2
    for left in (f"{stem}.{hexadecimal}.pth", f"{stem}.{hexadecimal}.pth.{hexadecimal}.partial", "other.pth"):
        (hub / left).touch()
    fetch(f"{address}/{name}")
    assert files_in(hub) == ["other.pth", name]


def test_what_breaks_off_is_continued_where_it_broke_off(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    content = weights(root / "resume.pth").read_bytes()
    half = len(content) // 2
    told = refusal(f"{address}/resume.pth")
    assert told.startswith(
        f"the download broke off after {half} of {len(content)} bytes; the {half} bytes that came are kept, and the "
        f"next attempt goes on from there; put the file of that URL at {hub}"
    )
    assert files_in(hub) == [".resume.partial.pth", ".resume.partial.version"]
    path = fetch(f"{address}/resume.pth")
    assert path.read_bytes() == content
    assert Server.ranges == [None, f"bytes={half}-"]
    assert files_in(hub) == ["resume.pth"]


def test_parts_of_two_versions_are_never_joined(server: tuple[str, Path]) -> None:
    address, root = server
    weights(root / "resume.pth")
    refusal(f"{address}/resume.pth")
    content = weights(root / "resume.pth", 2.0).read_bytes()
    assert fetch(f"{address}/resume.pth").read_bytes() == content


def test_a_server_that_sends_no_parts_sends_the_whole_file_again(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    content = weights(root / "resume_whole.pth").read_bytes()
    refusal(f"{address}/resume_whole.pth")
    assert fetch(f"{address}/resume_whole.pth").read_bytes() == content
    assert len(Server.ranges) == 2


def test_a_part_that_was_not_asked_for_is_refused(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    weights(root / "resume_other.pth")
    refusal(f"{address}/resume_other.pth")
    told = refusal(f"{address}/resume_other.pth")
    assert told.startswith("the server sent another part of the file than it was asked for; put")
    assert files_in(hub) == []


def test_a_download_that_is_longer_than_the_file_begins_again(server: tuple[str, Path], hub: Path) -> None:
    """As when the process was killed after the last byte."""
    address, root = server
    content = weights(root / "resume.pth").read_bytes()
    refusal(f"{address}/resume.pth")
    next(hub.rglob("*.partial.pth")).write_bytes(content)
    assert fetch(f"{address}/resume.pth").read_bytes() == content
    assert Server.ranges == [None, f"bytes={len(content)}-", None]


def test_a_continued_download_with_a_wrong_hash_leaves_nothing(server: tuple[str, Path], hub: Path) -> None:
    address, root = server
    content = weights(root / "resume-0123abcd.pth").read_bytes()
    refusal(f"{address}/resume-0123abcd.pth")
    told = refusal(f"{address}/resume-0123abcd.pth")
    digest = hashlib.sha256(content).hexdigest()
    assert told.startswith(f"the download has the SHA-256 {digest}, and not the published 0123abcd...; put the file")
    assert files_in(hub) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal_unless_it_is_not_wanted(
    progress: bool, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, root = server
    weights(root / "w.pth")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(f"{address}/w.pth", progress=progress)
    assert ("100%" in terminal.getvalue()) == progress
    assert bool(terminal.getvalue()) == progress
