"""The gallery: what its pages hold, that nothing is missing beside them, and how a real browser shows them."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from experiments.gallery import BROWSERS, build, read_page, screenshot

VOID = {"meta", "link", "img", "br", "hr", "input"}
FIRST = """# Attention & what helps

`python -m experiments.first` (two runs; a minute). Entropy <low> falls when logits
grow, e.g. 3. Second sentence. Raw: [runs](first/runs.csv), see [speed](second.md#how) and [gone](first/gone.csv).

![a plot](first/plot.png)

## Result

| arm | a number with a long heading | one more | and more | still more | the last of all |
| --- | --- | --- | --- | --- | --- |
| `none` | 1.0000 ± 0.0100 | 1.0000 ± 0.0100 | 1.0000 ± 0.0100 | 1.0000 ± 0.0100 | 1.0000 ± 0.0100 |

## Result

```bash
python -m experiments.first results_only=true  # the page alone
```

## Where the numbers come from

- hardware: NVIDIA H100 80GB HBM3
- versions: Python 3.12.3, torch 2.11.0
- commit: abc1234
- 2 runs, 1 minutes in all
"""
THIRD = """# In its folder

Of [runs](third.csv), see `python -m experiments.third`.

![a plot](plot.png)
"""
SECOND = """# Speed

How long a step takes. Measured on an AMD EPYC with torch 2.14.1+cpu and timm 1.0.31.

| arm | time |
| --- | --- |
| none | 1 |
"""


class Document(HTMLParser):
    """Collects ids and links, and checks that every element that is opened is closed, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        text = path.read_text()
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert self.open == [], path

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        given = {name: value or "" for name, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src") if name in given]
        assert tag != "img" or "alt" in given
        assert tag != "a" or "a" not in self.open
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two results pages, one in its own folder, and their files."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "first.md").write_text(FIRST)
    (folder / "second.md").write_text(SECOND)
    (folder / "first").mkdir()
    (folder / "first" / "runs.csv").write_text("arm,loss\nnone,1\n")
    (folder / "first" / "unused.csv").write_text("arm,loss\n")
    (folder / "first" / "notes.md").write_text("# No page")
    (folder / "third").mkdir()
    (folder / "third" / "third.md").write_text(THIRD)
    (folder / "third" / "third.csv").write_text("arm,loss\n")
    for name in ("first", "third"):
        Image.new("RGB", (1200, 400), "white").save(folder / name / "plot.png")
    return folder


@pytest.fixture(scope="module")
def site(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site built from them."""
    return build(results, tmp_path_factory.mktemp("site") / "gallery").parent


def test_a_page_names_its_commands_and_environment(results: Path) -> None:
    page = read_page(results / "first.md", results)
    assert page.title == "Attention & what helps"
    assert page.commands == ["python -m experiments.first", "python -m experiments.first results_only=true"]
    assert page.environment == {
        "hardware": "NVIDIA H100 80GB HBM3", "versions": "Python 3.12.3, torch 2.11.0", "commit": "abc1234",
    }  # fmt: skip
    assert read_page(results / "second.md", results).environment == {
        "hardware": "AMD EPYC", "versions": "torch 2.14.1+cpu, timm 1.0.31",
    }  # fmt: skip


def test_the_summary_is_the_first_sentence_after_the_command(results: Path) -> None:
    assert read_page(results / "first.md", results).summary == "Entropy &lt;low&gt; falls when logits\ngrow, e.g. 3."
    assert read_page(results / "second.md", results).summary == "How long a step takes."


def test_every_link_and_picture_of_the_site_is_there(site: Path) -> None:
    documents = {path.name: Document(path) for path in site.glob("*.html")}
    assert set(documents) == {"index.html", "first.html", "second.html", "third.html"}
    for document in documents.values():
        assert len(document.ids) == len(set(document.ids))
        for link in document.links:
            if link == "data:,":
                continue
            name, _, anchor = link.partition("#")
            assert not name or (site / name).is_file(), link
            # an anchor of another page is that page's affair, unless it was made here
            assert name or anchor in document.ids, link
    assert {"first/plot.png", "third/plot.png"} <= set(documents["index.html"].links)
    assert {"third/plot.png", "third/third.csv"} <= set(documents["third.html"].links)
    assert {"first/runs.csv", "second.html#how", "#result", "#result-2"} <= set(documents["first.html"].links)
    assert not (site / "first" / "unused.csv").exists()


def test_the_page_shows_the_table_in_its_own_box(site: Path) -> None:
    page = (site / "first.html").read_text()
    assert '<div class="scroll" tabindex="0"><table>' in page
    assert page.count("<td>1.0000 ± 0.0100</td>") == 5
    assert "<h1>Attention &amp; what helps</h1>" in page


def test_a_card_without_a_picture_shows_the_table(site: Path) -> None:
    index = (site / "index.html").read_text()
    assert index.count('<img src="') == 2
    assert re.search(
        r'inert><table>.*?<td>none</td>.*?</table></div>\s*<h2><a href="second.html">Speed', index, re.DOTALL
    )


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.glob("*.html"):
        assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import|<script""", path.read_text())


def test_what_is_missing_is_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "page.md").write_text("# Page\n\nSee [this](gone.csv) and ![that](gone.png).\n")
    (tmp_path / "bare.md").write_text("No title.\n")
    index = build(tmp_path, tmp_path / "site")
    said = capsys.readouterr().err.replace("\n", " ")
    assert "page.md: gone.csv is not beside it" in said
    assert "page.md: gone.png is not beside it" in said
    assert "bare.md does not start with a title" in said
    page = (index.parent / "page.html").read_text()
    assert "See this and [not there: gone.png]." in page
    assert ">bare</a>" in index.read_text()


def test_a_folder_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There are no results pages"):
        build(tmp_path, tmp_path / "site")


def test_our_pages_build(tmp_path: Path) -> None:
    index = build(site=tmp_path)
    documents = {path.name: Document(path) for path in index.parent.glob("*.html")}
    assert {"collapse.html", "early_warning.html", "lr_sensitivity.html", "sparsity.html"} <= set(documents)
    for name, document in documents.items():
        for link in document.links:
            target = link.partition("#")[0]
            assert not target or link.startswith(("http", "data:,")) or (tmp_path / target).is_file(), (name, link)


def browser() -> str:
    """A Chromium, or a skip."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip("no Chromium")


def test_a_screenshot_is_small(site: Path, tmp_path: Path) -> None:
    browser()
    screenshot(site / "index.html", tmp_path / "gallery.png")
    with Image.open(tmp_path / "gallery.png") as image:
        assert (image.width, image.height) == (1120, 1000)
        assert len(image.convert("RGB").resize((56, 50)).getcolors(2800)) > 10
    assert (tmp_path / "gallery.png").stat().st_size < 200 * 1024


def test_a_screenshot_without_a_browser_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install chromium"):
        screenshot(tmp_path / "index.html", tmp_path / "gallery.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_real_browser_shows_it(width: int, scheme: str, site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        page = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(request.url))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
            page.wait_for_function("[...document.images].every(image => image.naturalWidth)")
            assert page.evaluate("document.documentElement.scrollWidth") == width, path
            ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
            bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
            assert (bright[0] > bright[1] + 400) if scheme == "dark" else (bright[1] > bright[0] + 400)
        box = page.goto((site / "first.html").as_uri()) and page.locator(".scroll").first
        shown, whole = box.evaluate("box => [box.clientWidth, box.scrollWidth]")
        assert (whole > shown) == (width == 390)
        page.goto((site / "index.html").as_uri())
        page.get_by_role("link", name="Speed").click()
        assert page.title() == "Speed: lightning_reg"
        chromium.close()
    assert said == []
