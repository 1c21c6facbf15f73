"""Reports: one self-contained file in which nothing runs, with the numbers that were put in."""

from __future__ import annotations

import base64
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptcore.errors import UserError
from gptcore.report import gold_and_proxy, plot, run_page
from gptcore.report.html import Page, cell


class Reader(HTMLParser):
    """Tags with their attributes, cells of tables, text; complains of tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def full_page() -> Page:
    page = Page("A <run> & more", subtitle="two words")
    page.section("Numbers & tables")
    page.table(
        ["name", "value"], [["a<b>", 0.123456], ["none", None], ["many", 1234567], ["nan", float("nan")]]
    )
    page.section("Rates")
    page.intervals([("one", 0.5, 0.4, 0.6), ("<two>", 0.7, 0.65, 0.75)], label="win rate", reference=0.5)
    page.sample("<script>alert(1)</script>", "a model's text")
    page.settings({"ppo": {"beta": 0.1}, "seed": 3})
    return page


def test_the_page_is_whole_escaped_and_alone() -> None:
    text = full_page().render()
    reader = Reader(text)
    assert reader.of("script") == [] and "&lt;script&gt;alert(1)" in text
    assert not re.findall(
        r"(?:src|href)=\"(?!data:image/png;base64,|#)", text
    )  # nothing is loaded from anywhere
    assert [link["href"] for link in reader.of("a")] == [f"#{h['id']}" for h in reader.of("h2")]
    assert (
        "0.1235" in reader.cells
        and "1,234,567" in reader.cells
        and "–" in reader.cells
        and "nan" in reader.cells
    )
    assert "0.5 [0.4, 0.6]" in reader.cells and "ppo.beta" in reader.cells
    assert len(reader.of("img")) == 1 and reader.of("img")[0]["alt"]


def test_images_are_inside_and_whole() -> None:
    data = re.findall(r"base64,([A-Za-z0-9+/=]+)", full_page().render())
    width, height = size_of(base64.b64decode(data[0]))
    assert width > 400 and height > 80


def test_the_same_input_gives_the_same_file() -> None:
    assert full_page().render() == full_page().render()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1"),
        (True, "True"),
        ((0.5, 0.25, 0.75), "0.5 [0.25, 0.75]"),
        (1e-9, "1e-09"),
        ("x", "x"),
        (12, "12"),
    ],
)
def test_cells(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells, the head 2"):
        Page("x").table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="no PNG"):
        Page("x").image(b"GIF89a", "a plot")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.panels([plot.Panel("empty", [plot.Series("a", [])])])
    with pytest.raises(UserError, match="cannot write .*: No such file"):
        Page("x").write(tmp_path / "nowhere" / "report.html")
    with pytest.raises(UserError, match="empty has no metrics yet"):
        run_page.page("x", {"empty": []})


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Page("before").write(tmp_path / "report.html")

    def full(self: Path, text: str, **_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        Page("after").write(path)
    assert "before" in path.read_text() and list(tmp_path.iterdir()) == [path]


def lines(scale: float) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for step in range(1, 301):
        found.append({"kind": "train", "step": step, "reward": scale * step, "kl": 0.1, "tokens": step * 100})
        if step % 100 == 0:
            rate = step / 400
            found.append({
                "kind": "evaluation", "step": step, "odd": None,
                "win_rate": rate, "win_rate_low": rate - 0.1, "win_rate_high": rate + 0.1,
            })  # fmt: skip
    found.append({"kind": "sample", "step": 300, "prompt": "2 + 2 = ", "text": "4 </pre><b>", "reward": 1.0})
    found.append({"kind": "warning", "step": 7, "text": "KL rose"})
    return found


def test_a_page_of_runs_shows_last_values_curves_samples_and_warnings() -> None:
    page = run_page.page("two", {"a": lines(1.0), "b": lines(2.0)}, {"a": {"seed": 1}})
    reader = Reader(page.render())
    last = {reader.cells[i]: reader.cells[i + 1 : i + 3] for i in range(0, len(reader.cells), 3)}
    assert last["train: reward"] == ["300", "600"]
    assert (
        last["evaluation: win_rate"] == ["0.75 [0.65, 0.85]"] * 2
    )  # bounds beside their estimate, not as fields
    assert "evaluation: win_rate_low" not in reader.cells and "evaluation: odd" not in reader.cells
    assert len(reader.of("img")) == 2  # evaluation and train; a sample's single reward is no curve
    assert "2 + 2 = 4 &lt;/pre&gt;&lt;b&gt;" in page.render() and "KL rose" in page.render()


def test_gold_and_proxy_are_drawn_over_the_root_of_kl() -> None:
    told = [
        {"kind": "evaluation", "step": i, "kl": float(i * i), "gold": 5.0 - abs(i - 3), "proxy": float(i)}
        for i in range(6)
    ]
    gold, proxy = gold_and_proxy.panels({"a": told})
    assert proxy.series[0].points == [(float(i), float(i)) for i in range(6)]
    assert gold.title == "a: gold" and gold.series[0].points[3] == (3.0, 5.0)
    assert "Gold and proxy reward" in run_page.page("x", {"a": told}).render()
    assert gold_and_proxy.panels({"a": lines(1.0)}) == []


def test_iterations_of_ppo_are_a_line_and_its_evaluations_dots() -> None:
    told: list[dict[str, object]] = [
        {"kind": "train", "step": i, "kl": kl, "reward": float(i), "gold_reward": i / 10}
        for i, kl in ((1, -0.01), (2, 9.0), (3, 4.0))
    ]
    told.append({"kind": "evaluation", "step": 3, "val_kl": 6.25, "val_reward": 2.5, "val_gold_reward": 0.2})
    gold, proxy = gold_and_proxy.panels({"ppo": told})
    # by divergence, whose estimate may fall below 0 near the start
    assert gold.series[0].points == [(0.0, 0.1), (2.0, 0.3), (3.0, 0.2)] and not gold.series[0].dots
    assert proxy.series[1].points == [(2.5, 2.5)] and proxy.series[1].dots
    assert [one.name for one in gold.series] == ["iterations", "held out"]
    line, dots = (
        plot.panels([plot.Panel("x", [plot.Series("a", [(0, 0), (1, 1)], dots=d)])]) for d in (False, True)
    )
    assert line != dots
    alone = [{**one, "kl": 0.0} for one in told if one["kind"] == "train"]
    assert gold_and_proxy.panels({"without a reference": alone}) == []
    assert gold_and_proxy.panels({"no gold": [line for line in lines(1.0) if line["kind"] == "train"]}) == []


def test_constants_and_counters_are_no_curves() -> None:
    names = run_page._names({"a": lines(1.0)}, "train")
    drawn = [name for name in names if run_page._panel({"a": lines(1.0)}, "train", name) is not None]
    assert names == ["reward", "kl", "tokens"] and drawn == ["reward"]
    panel = run_page._panel({"a": lines(1.0)}, "evaluation", "win_rate")
    assert panel is not None and panel.series[0].bounds == [(0.15, 0.35), (0.4, 0.6), (0.65, 0.85)]
