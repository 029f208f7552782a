"""Download a file: whole, checked, and from a server that answers, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from resdet.errors import WeightsError, first_line
from resdet.version import VERSION

TIMEOUT = 30.0
"""Seconds in which a server must answer, and send the next bytes."""

_CHUNK = 1 << 18
_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def download(url: str, path: Path, digits: str | None) -> None:
    """Write the contents of an http or https URL to ``path``, over what may be there.

    Args:
        url: The address; redirections are followed to other http and https addresses.
        path: The file, which is incomplete if an error is raised.
        digits: The first hexadecimal digits that the SHA-256 of the contents must have, if they are known.

    Raises:
        WeightsError: If the server does not answer, sends something else than was asked for, or stops.
        OSError: If the file cannot be written.
    """
    request = urllib.request.Request(url, headers={"User-Agent": f"resdet/{VERSION}"})
    try:
        with _OPENER.open(request, timeout=TIMEOUT) as response, path.open("wb", buffering=0) as file:
            length = int(response.headers.get("Content-Length") or -1)
            digest, received = _copy(response, file, url, length)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, _NotWrittenError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        reason = getattr(error, "reason", None)  # of a URLError, which a connection raises
        cause = reason if isinstance(reason, OSError) else error
        why = f"nothing came for {TIMEOUT:g} seconds" if isinstance(cause, TimeoutError) else first_line(cause)
        raise WeightsError(f"{url}: cannot be downloaded ({why})") from error
    if length not in (-1, received):
        raise WeightsError(f"{url}: the download broke off after {received} of {length} bytes")
    if digits is not None and not digest.startswith(digits):
        raise WeightsError(f"{url}: the download does not have the hash in its name: {digest[: len(digits)]}")


class _NotWrittenError(OSError):
    """The file, and not the connection, failed."""


def _copy(response: http.client.HTTPResponse, file: IO[bytes], url: str, length: int) -> tuple[str, int]:
    """Copy a response to a file; return the SHA-256 and the number of bytes."""
    digest, received = hashlib.sha256(), 0
    with tqdm(
        total=max(length, 0) or None, unit="B", unit_scale=True, unit_divisor=1024, disable=not sys.stderr.isatty()
    ) as bar:
        # read1 returns what has come: a timeout counts from the last byte, and signals are seen in between.
        while part := response.read1(_CHUNK):
            if not received and _PAGE.match(part):
                raise WeightsError(
                    f"{url}: the server sent a web page, not a weights file (does the address need a login, or is it "
                    "that of a page about the file?)"
                )
            digest.update(part)
            try:
                file.write(part)
            except OSError as error:
                raise _NotWrittenError(error.errno, error.strerror) from error
            received += len(part)
            bar.update(len(part))
    return digest.hexdigest(), received


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
