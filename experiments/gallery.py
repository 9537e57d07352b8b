"""One static site of all results pages, which opens from disk: python -m experiments.gallery [FOLDER].

Each page of ``experiments/results``, and of each folder there the page of its name, becomes a page of HTML, with the
commands and the environment that it names in its head and what it links to beside it; the index shows a card for each.
``--screenshot experiments/results/gallery.png`` takes the picture of the README, which needs Chromium.
"""

import argparse
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from PIL import Image
from rich.console import Console

from experiments.report import TEMPLATES
from experiments.run_info import ROOT

RESULTS = ROOT / "experiments" / "results"
COMMAND = re.compile(r"(python -m|make) \S+.*")
PROVENANCE = re.compile(r"(hardware|versions|commit): +(.+)")
PACKAGES = r"Python|torch|lightning|torchmetrics|timm|transformers|peft|hydra-core|triton|CUDA"
VERSION = re.compile(rf"\b(?:{PACKAGES}) \d+(?:\.\w+)+(?:\+\w+)?")
HARDWARE = re.compile(r"NVIDIA \w+(?: \d+GB)?(?: HBM\w*)?|\b(?:Intel|AMD) \w+\b")
COMMIT = re.compile(r"\bcommit ([0-9a-f]{7,40})\b")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z*\"'(])")
SLUG = re.compile(r"[^a-z0-9]+")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCREENSHOT_SIZE = (1120, 1000)

console = Console(stderr=True)


@dataclass
class Page:
    """A results page, rendered.

    Args:
        stem: Of its file.
        title: Its first heading.
        summary: HTML of its first sentence that is more than a command.
        body: HTML of everything below the title.
        picture: Its first picture, relative to the site; None if it has none.
        table: HTML of its first table, what the card shows for want of a picture; None if it has none.
        headings: Id and text of each section.
        commands: What it says to run.
        environment: Hardware, versions and commit, as far as it names them.
        files: What it links to or shows, relative to the results.
    """

    stem: str
    title: str
    summary: Markup
    body: Markup
    picture: str | None
    table: Markup | None
    headings: list[tuple[str, str]]
    commands: list[str]
    environment: dict[str, str]
    files: set[str]


def build(results: Path = RESULTS, site: Path = ROOT / "outputs" / "gallery") -> Path:
    """Write the site, over what an earlier call wrote there, and return its index.

    Raises:
        FileNotFoundError: If there are no results pages.
    """
    own = [path for path in results.glob("*/*.md") if path.stem == path.parent.name]
    sources = sorted([*results.glob("*.md"), *own], key=lambda path: path.stem)
    if not sources:
        raise FileNotFoundError(f"There are no results pages (*.md) in {results}.")
    pages = [read_page(source, results) for source in sources]
    site.mkdir(parents=True, exist_ok=True)
    for name in sorted(set().union(*(page.files for page in pages))):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(results / name, site / name)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    for place, page in enumerate(pages):
        html = environment.get_template("gallery_page.html.j2").render(
            page=page, before=next(iter(pages[:place][-1:]), None), after=next(iter(pages[place + 1 :]), None)
        )
        (site / f"{page.stem}.html").write_text(html, encoding="utf-8")
    index = site / "index.html"
    index.write_text(environment.get_template("gallery_index.html.j2").render(pages=pages), encoding="utf-8")
    return index


def screenshot(index: Path, picture: Path) -> None:
    """Take a picture of the index in a headless browser, in 256 colours.

    Raises:
        FileNotFoundError: If there is no browser.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError("A screenshot needs Chromium. Install it with `apt-get install chromium`.")
    size = "{},{}".format(*SCREENSHOT_SIZE)
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}",
               f"--screenshot={picture.resolve()}", index.resolve().as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


def read_page(path: Path, results: Path) -> Page:
    """Parse and render one page; what it links to must lie beside it, what does not is reported and left out."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for kind, before, after in (("open", '<div class="scroll" tabindex="0">', ""), ("close", "", "</div>")):
        markdown.add_render_rule(f"table_{kind}", _around(before, after))
    markdown.add_render_rule("image", _linked_image)
    tokens = markdown.parse(path.read_text(encoding="utf-8"))
    files = _localise(tokens, path, results)
    headings = _name_headings(tokens)
    title, rest = _split_title(tokens, path)

    def render(part: Sequence[Token]) -> Markup:
        return Markup(markdown.renderer.render(part, markdown.options, {}))

    pictures = [str(token.attrs["src"]) for token in _inline(rest) if token.type == "image"]
    return Page(
        stem=path.stem,
        title=title,
        summary=render(_first_sentence(rest)),
        body=render(rest),
        picture=next(iter(pictures), None),
        table=_first_table(rest, render),
        headings=headings,
        commands=commands(rest),
        environment=environment_of(rest),
        files=files,
    )


def commands(tokens: Sequence[Token]) -> list[str]:
    """Code that starts like a command, in order, each once."""
    code = [token.content for token in _inline(tokens) if token.type == "code_inline"]
    code += [line for token in tokens if token.type in ("fence", "code_block") for line in token.content.splitlines()]
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in code if COMMAND.fullmatch(line.strip())))


def environment_of(tokens: Sequence[Token]) -> dict[str, str]:
    """Hardware, versions and commit: from the lines that ``evidence.provenance`` writes, else from the prose."""
    texts = [_text(token) for token in tokens if token.type == "inline"]
    said = {match[1]: match[2] for text in texts if (match := PROVENANCE.fullmatch(text))}
    prose = "\n".join(texts)
    found = {"hardware": HARDWARE.findall(prose), "versions": VERSION.findall(prose), "commit": COMMIT.findall(prose)}
    read = {key: ", ".join(dict.fromkeys(values)) for key, values in found.items() if values}
    return {key: {**read, **said}[key] for key in found if key in {**read, **said}}


def _around(before: str, after: str) -> Callable[..., str]:
    def rule(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        return before + renderer.renderToken(tokens, index, options, env) + after

    return rule


def _linked_image(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """As the default rule draws it, within a link to itself, so that a phone can show it whole."""
    image = renderer.image(tokens, index, options, env)
    inside = sum({"link_open": 1, "link_close": -1}.get(token.type, 0) for token in tokens[:index])
    return image if inside else str(Markup('<a href="{}">{}</a>').format(tokens[index].attrs["src"], Markup(image)))


def _localise(tokens: Sequence[Token], path: Path, results: Path) -> set[str]:
    """Point links at pages of the site and at copied files; returns these files."""
    files = set()
    for block in (token for token in tokens if token.type == "inline"):
        kept: list[Token] = []
        dropped = 0
        for token in block.children or []:
            if token.type == "link_close" and dropped:
                dropped -= 1
                continue
            key = {"image": "src", "link_open": "href"}.get(token.type)
            if key is None:
                kept.append(token)
                continue
            target = str(token.attrs[key])
            if re.match(r"(https?:|mailto:|#)", target) and token.type == "link_open":
                token.attrs["rel"] = "noreferrer"
            elif (path.parent / target.split("#")[0]).is_file() and ".." not in target:
                name, _, anchor = target.partition("#")
                if name.endswith(".md"):
                    token.attrs[key] = f"{name.removesuffix('.md')}.html" + (f"#{anchor}" if anchor else "")
                else:
                    token.attrs[key] = (path.parent / name).relative_to(results).as_posix()
                    files.add(str(token.attrs[key]))
            else:
                console.print(f"[yellow]{path.name}: {target} is not beside it, and left out.")
                dropped += token.type == "link_open"
                token = Token("text", "", 0, content=f"[not there: {target}]" if token.type == "image" else "")
            if token.type == "image":
                token.attrs["loading"] = "lazy"
            kept.append(token)
        block.children = kept
    return files


def _name_headings(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Give every section an id; returns them with their texts."""
    found: list[tuple[str, str]] = []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h2":
            text = _text(inline)
            slug = SLUG.sub("-", text.lower()).strip("-") or "section"
            taken = sum(name == slug or name.startswith(f"{slug}-") for name, _ in found)
            opening.attrs["id"] = f"{slug}-{taken + 1}" if taken else slug
            found.append((str(opening.attrs["id"]), text))
    return found


def _split_title(tokens: list[Token], path: Path) -> tuple[str, list[Token]]:
    if len(tokens) < 3 or tokens[0].tag != "h1":
        console.print(f"[yellow]{path.name} does not start with a title.")
        return path.stem.replace("_", " "), tokens
    return _text(tokens[1]), tokens[3:]


def _first_sentence(tokens: Sequence[Token]) -> list[Token]:
    """Of the first paragraph, without a command that stands in front."""
    paragraph = next((inline for opening, inline in pairwise(tokens) if opening.type == "paragraph_open"), None)
    if paragraph is None:
        return []
    sentences: list[list[Token]] = [[]]
    for token in paragraph.children or []:
        first, *others = SENTENCE.split(token.content) if token.type == "text" else [token]
        for part, new in [(first, False), *((other, True) for other in others)]:
            if new:
                sentences.append([])
            sentences[-1].append(Token("text", "", 0, content=part) if isinstance(part, str) else part)
    spoken = [part for part in sentences if not _is_command(part)]
    return [Token("inline", "", 0, children=(spoken or sentences)[0])]


def _is_command(sentence: Sequence[Token]) -> bool:
    first = next((token for token in sentence if token.type != "text" or token.content.strip()), None)
    return first is not None and first.type == "code_inline" and bool(COMMAND.fullmatch(first.content))


def _first_table(tokens: Sequence[Token], render: Callable[[Sequence[Token]], Markup]) -> Markup | None:
    kinds = [token.type for token in tokens]
    if "table_open" not in kinds:
        return None
    inside = tokens[kinds.index("table_open") + 1 : kinds.index("table_close")]
    return Markup("<table>{}</table>").format(render(inside))


def _inline(tokens: Sequence[Token]) -> Iterator[Token]:
    return (child for token in tokens for child in token.children or [])


def _text(token: Token) -> str:
    breaks = ("softbreak", "hardbreak")
    return "".join(" " if child.type in breaks else child.content for child in token.children or [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "site", nargs="?", type=Path, default=ROOT / "outputs" / "gallery", help="folder it is written to"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results pages")
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="also take a picture of the index")
    options = parser.parse_args(arguments)
    index = build(options.results, options.site)
    print(index)
    if options.screenshot:
        screenshot(index, options.screenshot)


if __name__ == "__main__":
    main()
