"""One HTML file per run: text, tables, plots and intervals, with everything inside it.

    page = Page("runs/ppo", subtitle="PPO on arithmetic")
    page.section("Win rates")
    page.intervals([("PPO against SFT", 0.61, 0.57, 0.65)], label="win rate", reference=0.5)
    page.table(["model", "exact match"], [["SFT", 0.72], ["PPO", 0.95]])
    page.write("report.html")

The file needs no network, no script and no other file; plots are PNG inside it. Whatever is written into it is text: a
model's output with markup in it is shown, not run.
"""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptcore.errors import UserError
from gptcore.report import plot

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.soft { color: var(--soft); } nav a { margin-right: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: .9rem; }
pre { border: 1px solid var(--line); padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


class Page:
    """A report that grows from top to bottom; ``write`` puts it into one file."""

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[tuple[str, str]] = []
        self._parts: list[str] = []

    def section(self, title: str) -> None:
        """Begin a section; the page's head links to it."""
        anchor = f"{len(self._sections) + 1}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def sample(self, text: str, caption: str = "") -> None:
        """Text as a model wrote it, line by line."""
        shown = f'<p class="soft">{html.escape(caption)}</p>' if caption else ""
        self._parts.append(f"{shown}<pre>{html.escape(text)}</pre>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Rows under a head. Numbers stand to the right with four digits; None is a dash; a tuple of three numbers is
        an estimate with its interval.

        Raises ValueError where a row is not as long as the head.
        """
        rows = [list(row) for row in rows]
        for i, row in enumerate(rows):
            if len(row) != len(head):
                raise ValueError(f"Page.table: row {i} has {len(row)} cells, the head {len(head)}")
        numeric = [any(_is_number(row[i]) for row in rows) for i in range(len(head))]
        classes = [' class="number"' if right else "" for right in numeric]
        top = "".join(f"<th{c}>{html.escape(name)}</th>" for c, name in zip(classes, head, strict=True))
        body = "".join(
            "<tr>"
            + "".join(f"<td{c}>{html.escape(cell(x))}</td>" for c, x in zip(classes, row, strict=True))
            + "</tr>"
            for row in rows
        )
        self._parts.append(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")

    def settings(self, values: Mapping[str, Any]) -> None:
        """Nested settings as a table of dotted names, folded away."""
        self._parts.append("<details><summary>settings</summary>")
        self.table(["name", "value"], [[name, str(value)] for name, value in _flat(values)])
        self._parts.append("</details>")

    def image(self, png: bytes, caption: str) -> None:
        """A plot, as :mod:`gptcore.report.plot` makes them; the caption says what it shows to those who cannot see."""
        if not png.startswith(b"\x89PNG"):
            raise ValueError("Page.image: these bytes are no PNG")
        data, words = base64.b64encode(png).decode(), html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
        )

    def panels(self, panels: Sequence[plot.Panel], *, x_label: str, caption: str) -> None:
        """Small plots side by side; see :func:`gptcore.report.plot.panels`."""
        self.image(plot.panels(panels, x_label=x_label), caption)

    def intervals(
        self, rows: Sequence[tuple[str, float, float, float]], *, label: str, reference: float | None = None
    ) -> None:
        """Estimates with their intervals, (name, estimate, low, high), as a plot and as a table."""
        self.image(plot.intervals(rows, label=label, reference=reference), f"{label}, with intervals")
        self.table(["", label], [[name, tuple(numbers)] for name, *numbers in rows])

    def render(self) -> str:
        """The whole file."""
        title, subtitle = html.escape(self.title), html.escape(self.subtitle)
        links = "".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in self._sections)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
            f'<h1>{title}</h1><p class="soft">{subtitle}</p><nav>{links}</nav>\n'
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file whole or not at all; returns its path.

        Raises UserError where it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            temporary.write_text(self.render(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not _is_number(value):
        return str(value)
    if isinstance(value, tuple):
        estimate, low, high = (cell(x) for x in value)
        return f"{estimate} [{low}, {high}]"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if not math.isfinite(value) else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 3 and all(_is_number(x) for x in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
