"""A file on the Hub, of which only the bytes that are read are asked for.

Beware Large files lie on another host, to which the address itself is the permission: the token of
       the Hub is not sent there.
"""

from __future__ import annotations

import io
import os
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)


class RemoteFile(io.RawIOBase):
    """One file of a repository at one commit, to read and seek in; use as a context manager.

    Args:
        repo_id: the repository.
        file: its name there.
        revision: the commit.
        token: as of `hf_hub_download`.

    Raises what the client raises where the file can't be had.
    """

    def __init__(
        self, repo_id: str, file: str, revision: str | None, token: str | bool | None
    ) -> None:
        url = hf_hub_url(repo_id, file, revision=revision)
        found = get_hf_file_metadata(url, token=token)
        self._url, self._size, self._at = found.location, found.size or 0, 0
        here = urlsplit(self._url).netloc == urlsplit(url).netloc
        self._headers = build_hf_headers(token=token if here else False)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere else; asks for nothing."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"byte {start + offset} is before the file.")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Ask for the bytes that fit into a buffer; returns how many there were."""
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        part = f"bytes={self._at}-{self._at + wanted - 1}"
        answer = http_backoff(
            "GET",
            self._url,
            headers={**self._headers, "Range": part, "Accept-Encoding": "identity"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        hf_raise_for_status(answer)
        data = answer.content
        if answer.status_code != 206:  # a server that knows no ranges
            data = data[self._at : self._at + wanted]
        if len(data) != wanted:
            raise OSError(f"{part} of {self._url}: only {len(data)} bytes came")
        buffer[:wanted] = data
        self._at += wanted
        return wanted
