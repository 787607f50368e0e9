"""python -m tools.chapters: write what is made of the list of chapters.

From `book/chapters.yml` come `_toc.yml`, the map in the intro, and the table on the page of each part.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.sources import ROOT

LIST = ROOT / "book" / "chapters.yml"
BEGIN, END = "<!-- chapters: begin -->", "<!-- chapters: end -->"
# What the table of contents has beside the chapters.
AFTER = {
    "Labs": ["labs/learning-rate", "labs/init-rank", "labs/quantization-bits", "labs/long-sequences"],
    "Reference": [
        "book/past-one-machine",
        "book/kernels",
        "book/ledger",
        "book/timing",
        "book/api",
        "book/bibliography",
    ],
}
PART_KEYS = {"part", "title", "about", "glance", "chapters"}
CHAPTER_KEYS = {"slug", "title", "question", "changes", "cite", "arxiv", "code"}


def parts() -> list[dict[str, Any]]:
    """The parts with their chapters.

    Raises:
        ValueError: a part or chapter with a key that is unknown or missing, or a slug that appears twice.
    """
    found = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    seen: set[str] = set()
    for part in found:
        for entry, keys, needed in [
            (part, PART_KEYS, {"part", "title", "about", "chapters"}),
            *((chapter, CHAPTER_KEYS, {"slug", "title", "question"}) for chapter in part["chapters"]),
        ]:
            name = entry.get("slug", entry.get("part"))
            if wrong := sorted((entry.keys() - keys) | (needed - entry.keys())):
                raise ValueError(f"{LIST.name}, {name}: the keys must be of {sorted(keys)}, got or missed {wrong}")
            if "slug" in entry and name in seen:
                raise ValueError(f"{LIST.name}: {name} must appear once")
            seen.add(name)
    return found


def is_written(part: str, slug: str) -> bool:
    return (ROOT / "book" / part / f"{slug}.md").exists()


def table_of_contents() -> str:
    lines = ["# Written by `make chapters` from book/chapters.yml.", "format: jb-book", "root: book/intro", "parts:"]

    def section(caption: str, files: list[str]) -> None:
        lines.extend([f"  - caption: {caption}", "    chapters:", *(f"      - file: {file}" for file in files)])

    for part in parts():
        name = part["part"]
        files = [f"book/{name}/{c['slug']}" for c in part["chapters"] if is_written(name, c["slug"])]
        if is_written(name, "index"):
            section(part["title"], [f"book/{name}/index", *files])
    for caption, files in AFTER.items():
        section(caption, [file for file in files if (ROOT / f"{file}.md").exists()])
    return "\n".join(lines) + "\n"


def map_of_the_book() -> str:
    """Every chapter by part, those that are written with a link."""
    lines = []
    for part in parts():
        name, about = part["part"], part["about"]
        if is_written(name, "index"):
            about += f" [The part at a glance]({name}/index.md) {part.get('glance', 'has its chapters.')}"
        lines += [f"### {part['title']}", "", about, "", "| Chapter | What it is about |", "|---|---|"]
        for chapter in part["chapters"]:
            title = chapter["title"]
            link = (
                f"[{title}]({name}/{chapter['slug']}.md)"
                if is_written(name, chapter["slug"])
                else f"{title} *(planned)*"
            )
            lines.append(f"| {link} | {chapter['question']} |")
        lines.append("")
    return "\n".join(lines)


def table_of_part(part: dict[str, Any]) -> str:
    lines = ["| chapter | what it changes | paper |", "|---|---|---|"]
    for chapter in part["chapters"]:
        if is_written(part["part"], chapter["slug"]):
            number = chapter.get("arxiv")
            paper = f"[arXiv {number}](https://arxiv.org/abs/{number})" if number else ""
            link = f"[{chapter['title']}]({chapter['slug']}.md)"
            lines.append(f"| {link} | {chapter.get('changes', chapter['question'])} | {paper} |")
    return "\n".join(lines) + "\n"


def between(path: Path, content: str) -> str:
    """The text of a file with the part between its two markers replaced.

    Raises:
        ValueError: the file has not one marker of each kind.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.relative_to(ROOT)} must have one line {BEGIN} and one line {END}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{content.strip()}\n\n{END}{rest.partition(END)[2]}"


def generated() -> Iterator[tuple[Path, str]]:
    """Each file that is made of the list, with what it should hold."""
    yield ROOT / "_toc.yml", table_of_contents()
    yield ROOT / "book" / "intro.md", between(ROOT / "book" / "intro.md", map_of_the_book())
    for part in parts():
        page = ROOT / "book" / part["part"] / "index.md"
        if page.exists():
            yield page, between(page, table_of_part(part))


def misfits() -> list[str]:
    """What does not follow the list: files that are made of it, and chapters that don't cite their paper."""
    found = [
        f"{path.relative_to(ROOT)} does not follow book/chapters.yml (make format)"
        for path, text in generated()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    listed = {
        ROOT / "book" / part["part"] / f"{chapter['slug']}.md": chapter
        for part in parts()
        for chapter in part["chapters"]
    }
    for path in sorted((ROOT / "book").glob("*/*.md")):
        if path.stem != "index" and path not in listed:
            found.append(f"{path.relative_to(ROOT)} is not in book/chapters.yml")
    for path, chapter in listed.items():
        if path.exists() and chapter.get("cite", "no key") not in path.read_text(encoding="utf-8"):
            found.append(f"{path.relative_to(ROOT)} does not cite its paper, {chapter.get('cite', 'which has no key')}")
    return found


def main() -> int:
    for path, text in generated():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
