"""URLs of what this process has copied from an object store, or keeps there, by local path."""

from __future__ import annotations

from pathlib import Path

_urls: dict[str, str] = {}  # by the local path of the copy


def note_place(local: Path, url: str) -> None:
    """Record that ``local`` is a copy of what is at ``url``."""
    _urls[str(local)] = url.rstrip("/")


def place_of(path: Path | str) -> str:
    """Return ``path``, or the URL that it is a local copy of."""
    for local, url in _urls.items():
        if Path(path).is_relative_to(local):
            return url + str(path).removeprefix(local)
    return str(path)


def with_urls(text: str) -> str:
    """Return ``text`` with URLs in place of the local copies that it names."""
    for local, url in _urls.items():
        text = text.replace(local, url)
    return text
