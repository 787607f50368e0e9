"""The one list of chapters, and what is made of it."""

from pathlib import Path

import pytest
import yaml

from tools import chapters

LIST = """\
- part: red
  title: Red things
  about: What is red.
  glance: shows them all.
  chapters:
  - {slug: rose, title: The rose, question: why it is red, arxiv: '2401.00001', cite: rose2024}
  - {slug: tomato, title: The tomato, question: whether it is a fruit}
- part: blue
  title: Blue things
  about: What is blue.
  chapters:
  - {slug: sky, title: The sky, question: why it is blue}
"""


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "book"
    (folder / "red").mkdir(parents=True)
    for name in ("intro", "red/index"):
        (folder / f"{name}.md").write_text(f"# Title\n\n{chapters.BEGIN}\n{chapters.END}\n\nMore.\n")
    (folder / "red" / "rose.md").write_text("# The rose\n\n{cite:t}`rose2024`\n")
    (folder / "chapters.yml").write_text(LIST)
    monkeypatch.setattr(chapters, "ROOT", tmp_path)
    monkeypatch.setattr(chapters, "LIST", folder / "chapters.yml")
    return folder


def test_the_files_follow_the_list(book: Path) -> None:
    assert len(chapters.misfits()) == 3
    chapters.main()
    assert chapters.misfits() == []
    contents = yaml.safe_load((book.parent / "_toc.yml").read_text())
    assert contents["parts"][0]["chapters"] == [{"file": "book/red/index"}, {"file": "book/red/rose"}]
    intro = (book / "intro.md").read_text()
    assert "[The rose](red/rose.md) | why it is red" in intro and "The sky *(planned)*" in intro
    assert intro.startswith("# Title") and intro.endswith("More.\n")
    page = (book / "red" / "index.md").read_text()
    assert "[The rose](rose.md)" in page and "2401.00001" in page and "tomato" not in page


def test_a_new_chapter_is_asked_for(book: Path) -> None:
    chapters.main()
    (book / "red" / "tomato.md").write_text("# The tomato\n")
    assert [item.split()[0] for item in chapters.misfits()] == [
        "_toc.yml",
        "book/intro.md",
        "book/red/index.md",
        "book/red/tomato.md",
    ]
    (book / "red" / "beetroot.md").write_text("# Beetroot\n")
    assert any("beetroot.md is not in" in item for item in chapters.misfits())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("question: why it is blue", "subject: why", "sky.*question.*subject"),
        ("slug: sky", "slug: rose", "rose must appear once"),
        ("about: What is blue.", "abuot: What is blue.", "blue.*about"),
    ],
)
def test_a_fault_in_the_list_is_named(book: Path, old: str, new: str, words: str) -> None:
    (book / "chapters.yml").write_text(LIST.replace(old, new))
    with pytest.raises(ValueError, match=words):
        chapters.parts()


def test_a_page_without_its_markers_is_named(book: Path) -> None:
    (book / "intro.md").write_text("# Title\n")
    with pytest.raises(ValueError, match=r"book/intro\.md"):
        chapters.main()
