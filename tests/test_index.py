from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carvae.errors import ReadError
from carvae.page.index import Figure, Number, Table, write_index


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


NASTY = "<script>alert('x')</script> & \"quoted\""


def test_index_shows_everything_and_escapes_every_value(tmp_path: Path) -> None:
    (tmp_path / "a b#1.png").write_bytes(b"png")
    frame = pd.DataFrame({NASTY: [0.12345, np.nan], "n": [3, 4]}, index=pd.Index([NASTY, "s2"], name=NASTY))
    path = write_index(
        tmp_path,
        NASTY,
        [Figure("a b#1.png", NASTY, NASTY)],
        [Table(NASTY, frame, NASTY)],
        [Number("0.87" + NASTY, NASTY, NASTY)],
        introduction=NASTY,
    )
    assert path == tmp_path / "index.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "".join(page.words).count(NASTY) == 13
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"] == "a%20b%231.png"
    assert image["alt"] == f"{NASTY}. {NASTY}"
    assert "0.123" in page.words
    assert "nan" not in html
    assert sum(tag == "td" for tag, _ in page.tags) == 4


def test_index_needs_no_network_and_knows_light_and_dark(tmp_path: Path) -> None:
    html = write_index(tmp_path, "Demo", []).read_text(encoding="utf-8")
    assert "http" not in html
    assert "prefers-color-scheme: dark" in html
    assert {tag for tag, _ in Page(html).tags} == {"html", "head", "meta", "title", "style", "body", "h1"}


def test_index_names_the_figures_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"lacks x\.png, y\.png; save"):
        write_index(tmp_path, "Demo", [Figure("x.png", "X", ""), Figure("y.png", "Y", "")])
    assert not (tmp_path / "index.html").exists()
