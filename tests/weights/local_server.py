"""A web server in this process that does what servers do wrong."""

from __future__ import annotations

import hashlib
import http.server
import time
from pathlib import Path


class Server(http.server.SimpleHTTPRequestHandler):
    """What it does is in the path: cut, stall, late, slow, elsewhere, resume, or the file itself."""

    requests: list[str]
    ranges: list[str | None]  # that were asked for, of what resumes

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if "elsewhere" in self.path:
            self.send_response(302)
            self.send_header("Location", self.path.partition("to=")[2])
            self.end_headers()
            return
        if "resume" in self.path:
            self.send_from()
            return
        if not any(word in self.path for word in ("cut", "stall", "late", "slow")):
            super().do_GET()
            return
        if "late" in self.path:  # no answer at all
            time.sleep(20)
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if "stall" in self.path:
            time.sleep(20)
        if "slow" in self.path:
            time.sleep(0.5)
            self.wfile.write(content[len(content) // 2 :])

    def send_from(self) -> None:
        """Break off the first answer in the middle; go on from there if the same version is asked for.

        With "whole" in the path it is a server that cannot send parts, with "other" one that sends another part.
        """
        content = Path(self.translate_path(self.path)).read_bytes()
        tag, asked = f'"{hashlib.sha256(content).hexdigest()}"', self.headers.get("Range")
        self.ranges.append(asked)
        start = 0
        if asked and "whole" not in self.path and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            first = start + ("other" in self.path)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2 if len(self.ranges) == 1 else None])
