"""What came out of the claims, against what the claims files expect."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbformat import NotebookNode

from polylib.lab.claims import MIME, NOT_TESTED, by_number, card, read_claims, records_of
from tools.execute import executed_path, read_executed
from tools.sources import ROOT

Record = dict[str, str]


def claims_file(source: Path) -> Path:
    return ROOT / source.with_suffix(".claims.toml")


def with_texts(notebook: NotebookNode, texts: dict[str, dict[str, str]]) -> NotebookNode:
    """The notebook with its cards drawn again from the current claims file: a change of its text runs nothing."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if record := output.get("data", {}).get(MIME):
                output["data"]["text/html"] = card(record, texts.get(record["id"], {}))
    return notebook


def misfits(records: Iterable[Record], texts: dict[str, dict[str, str]]) -> Iterator[str]:
    """Claims that the page and the file don't agree to have."""
    seen = Counter(record["id"] for record in records)
    for id in sorted(seen.keys() | texts.keys(), key=by_number):
        if id not in texts:
            yield f"{id} is not in the claims file"
        elif seen[id] > 1:
            yield f"{id} appears {seen[id]} times in the chapter"
        elif not seen[id] and texts[id]["expected"] != NOT_TESTED:
            yield f"{id} is not in the chapter, and is expected to be tested"


def check(paths: Iterable[Path]) -> tuple[int, list[str]]:
    """Compare the verdicts of executed notebooks with the files. How many agree, and what does not, one line each."""
    agree, wrong = 0, []
    for path in paths:
        notebook = read_executed(executed_path(path))
        records = records_of(notebook) if notebook else []
        if not claims_file(path).exists():
            wrong += [f"{path}: has claims and no {claims_file(path).name}"] if records else []
            continue
        try:
            texts = read_claims(claims_file(path))
        except ValueError as error:
            wrong.append(str(error))
            continue
        if notebook is None:
            wrong.append(f"{path}: not executed, {len(texts)} claims unknown")
            continue
        wrong += [f"{path}: {misfit}" for misfit in misfits(records, texts)]
        for record in records:
            expected = texts.get(record["id"], {}).get("expected")
            if expected == record["verdict"]:
                agree += 1
            elif expected:
                wrong.append(
                    f"{path}: {record['id']} expected {expected!r}, found {record['verdict']!r};"
                    f" measured {record['measured'] or 'nothing'}; margin {record['margin'] or 'none'}"
                )
    return agree, wrong


def main() -> int:
    """Compare all that is executed."""
    from tools.sources import sources

    agree, wrong = check(sources())
    print(f"Claims: {agree} as expected, {len(wrong)} not", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
