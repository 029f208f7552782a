"""A local server, and a cache of downloads apart from the user's."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from local_server import Server

from resdet.weights import source
from resdet.weights.zoo import PUBLISHED, Published


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A local server: its address and the directory it serves."""
    root = tmp_path / "served"
    root.mkdir()
    Server.requests, Server.ranges = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(root))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", root
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty and apart from the user's."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def publish(server: tuple[str, Path], hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Published]]:
    """Offer a file on the local server under the name of a published detector, with what else is stated of it."""

    def serve(name: str, file: Path, **stated: object) -> Published:
        address, root = server
        if not (root / file.name).exists():
            (root / file.name).hardlink_to(file)
        entry = replace(PUBLISHED[name], **{"url": f"{address}/{file.name}", "md5": "", "size": None} | stated)
        monkeypatch.setitem(PUBLISHED, name, entry)
        return entry

    source._log_licence.cache_clear()
    yield serve
    source._log_licence.cache_clear()
