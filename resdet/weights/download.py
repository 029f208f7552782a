"""Download a file: from a server that answers, in several attempts if need be, and whole in the end or not at all."""

from __future__ import annotations

import http.client
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resdet.errors import WeightsError, first_line
from resdet.version import VERSION

TIMEOUT = 30.0
"""Seconds in which a server must answer, and send the next bytes."""

_CHUNK = 1 << 18
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def download(url: str, path: Path, *, progress: bool = True) -> None:
    """Write the contents of an http or https URL to ``path``, going on from where an earlier download broke off.

    When a download breaks off, what has come stays at ``path`` if the server said which version of the file it is
    (``ETag``, ``Last-Modified``): the next call asks for the rest of that version. Servers that have another version by
    then, or cannot send parts, send the whole file again. After other errors nothing is left.

    Args:
        url: The address; redirections are followed to other http and https addresses.
        path: The file.
        progress: Show a bar on a terminal.

    Raises:
        WeightsError: If the server does not answer, sends something else than was asked for, or stops.
        OSError: If the file cannot be written.
    """
    version = _version_file(path)
    begun = path.stat().st_size if path.exists() and version.exists() else 0
    try:
        _receive(url, path, begun, progress)
        version.unlink(missing_ok=True)
    except _NotWrittenError as error:
        remove_begun(path)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (OSError, http.client.HTTPException) as error:
        if begun and getattr(error, "code", None) == 416:  # there is no such part
            remove_begun(path)
            return download(url, path, progress=progress)
        kept = path.stat().st_size if path.exists() and version.exists() else 0
        if not kept:
            remove_begun(path)
        note = f"; the {kept} bytes that came are kept, and the next attempt goes on from there" if kept else ""
        raise WeightsError(f"{url}: {reason_of(error)}{note}") from error
    except KeyboardInterrupt:
        if not version.exists():
            remove_begun(path)
        raise
    except WeightsError:
        remove_begun(path)
        raise
    return None


class _NotWrittenError(OSError):
    """The file, and not the connection, failed."""


class _BrokeOffError(OSError):
    """The connection ended early."""


def reason_of(error: Exception) -> str:
    """Return why a connection failed, for a message that begins with the address."""
    if isinstance(error, _BrokeOffError):
        return str(error)
    reason = getattr(error, "reason", None)  # of a URLError, which a connection raises
    cause = reason if isinstance(reason, OSError) else error
    why = f"nothing came for {TIMEOUT:g} seconds" if isinstance(cause, TimeoutError) else first_line(cause)
    return f"cannot be downloaded ({why})"


def _receive(url: str, path: Path, begun: int, progress: bool) -> None:
    """Receive a file into ``path``; if ``begun`` bytes of it are there, ask for the rest."""
    version = _version_file(path)
    headers = {"User-Agent": f"resdet/{VERSION}"}
    if begun:
        headers |= {"Range": f"bytes={begun}-", "If-Range": version.read_text()}
    with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        is_part = response.status == 206
        if is_part and not response.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
            raise WeightsError(f"{url}: the server sent another part of the file than it was asked for")
        received = begun if is_part else 0
        rest = int(response.headers.get("Content-Length") or -1)
        length = received + rest if rest >= 0 else None
        # Cut off before its version is noted: bytes of one version never go with the name of another.
        with path.open("ab" if is_part else "wb") as file:
            _note_version(response, version)
            hidden = not (progress and sys.stderr.isatty())
            with tqdm(
                total=length, initial=received, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden
            ) as bar:
                # read1 returns what has come: a timeout counts from the last byte, and signals are seen in between.
                while part := response.read1(_CHUNK):
                    if not received and _PAGE.match(part):
                        raise WeightsError(
                            f"{url}: the server sent a web page, not a weights file (does the address need a login, "
                            "or is it that of a page about the file?)"
                        )
                    try:
                        file.write(part)
                        file.flush()
                    except OSError as error:
                        raise _NotWrittenError(error.errno, error.strerror) from error
                    received += len(part)
                    bar.update(len(part))
    if length not in (None, received):
        raise _BrokeOffError(f"the download broke off after {received} of {length} bytes")


def remove_begun(path: Path) -> None:
    """Remove what a download to ``path`` has left."""
    for file in (path, _version_file(path)):
        file.unlink(missing_ok=True)


def _version_file(path: Path) -> Path:
    """Return the file that holds the server's name for the version of which a part is at ``path``."""
    return path.with_suffix(".version")


def _note_version(response: http.client.HTTPResponse, file: Path) -> None:
    tag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if version := date if tag.startswith("W/") or not tag else tag:  # a weak tag is no name of these very bytes
        file.write_text(version)
    else:
        file.unlink(missing_ok=True)


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https only: urllib would go to ftp too."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if not newurl.startswith(("http://", "https://")):
            raise WeightsError(f"{req.full_url}: is redirected to {newurl}, which is refused: not http or https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirections)


def open_url(url: str) -> http.client.HTTPResponse:
    """Open an http or https URL, as ``download`` does, to read from it; connections raise OSErrors, HTTPExceptions."""
    request = urllib.request.Request(url, headers={"User-Agent": f"resdet/{VERSION}"})
    response: http.client.HTTPResponse = _OPENER.open(request, timeout=TIMEOUT)
    return response
