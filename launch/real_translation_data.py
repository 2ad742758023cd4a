"""Writes the data of two experiments on translation, from the help pages of LibreOffice.

  python launch/real_translation_data.py SOURCE ENGLISH FOLDER

For `configs/real_translation.py` and `configs/real_tokenizers.py`. SOURCE and ENGLISH are the
folders of HTML pages of two languages, of Debian's packages libreoffice-help-eu or -zh-cn and
libreoffice-help-en-us (MPL-2.0); FOLDER gets JSON lines. A paragraph has the same id in both, and
counts once for each English text. Files are held out as a whole.

  augment.jsonl      what the augment reads: the source language alone
  bridge.jsonl       D_C: aligned paragraphs of the same files
  validation.jsonl   aligned paragraphs of files that neither has met
  test.jsonl         the same, of other files
"""

import hashlib
import html.parser
import json
import pathlib
import random
import sys

SHARES = {"test": 0.1, "validation": 0.05}  # of the files
WORDS = (3, 25)  # of an English paragraph that is translated
COUNTS = {"bridge": 2_000, "validation": 100, "test": 200}
TAGS = ("p", "h1", "h2", "h3", "h4")


def main(source: str, english: str, folder: str) -> None:
    out, chance = pathlib.Path(folder), random.Random(0)
    texts: dict[str, list[dict]] = {name: [] for name in ("train", *SHARES)}
    met: set[str] = set()
    for path in sorted(pathlib.Path(source).rglob("*.html")):
        beside = pathlib.Path(english) / path.relative_to(source)
        if not beside.exists():
            continue
        ours, theirs = paragraphs(path), paragraphs(beside)
        for name in ours.keys() & theirs.keys():
            text, target = ours[name], theirs[name]
            if text and target and text != target and target not in met:
                met.add(target)
                texts[part_of(path.name)].append({"source": text, "targets": target})
    out.mkdir(parents=True, exist_ok=True)
    written = {"augment": [{"text": pair["source"]} for pair in texts["train"]]}
    for name, count in COUNTS.items():
        short = [
            pair
            for pair in texts["train" if name == "bridge" else name]
            if WORDS[0] <= len(pair["targets"].split()) <= WORDS[1]
        ]
        short.sort(key=lambda pair: pair["targets"])  # sets have no order
        written[name] = [
            {"inputs": f"Text: {pair['source']}\nEnglish:", "targets": f" {pair['targets']}"}
            for pair in chance.sample(short, count)
        ]
    written["augment"].sort(key=lambda record: record["text"])
    for name, records in written.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{out / name}.jsonl: {len(records):,}")


def part_of(name: str) -> str:
    """The part of a file: pages of one name lie in several folders, and say much the same."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"


class Paragraphs(html.parser.HTMLParser):
    """The texts of the elements that have an id, in `texts`."""

    def __init__(self):
        super().__init__()
        self.texts: dict[str, str] = {}
        self._open: tuple[str, str] | None = None
        self._said: list[str] = []

    def handle_starttag(self, tag, attrs):
        name = dict(attrs).get("id")
        if tag in TAGS and name:
            self._open, self._said = (tag, name), []

    def handle_endtag(self, tag):
        if self._open and tag == self._open[0]:
            self.texts[self._open[1]] = " ".join("".join(self._said).split())
            self._open = None

    def handle_data(self, data):
        self._said.append(data)


def paragraphs(path: pathlib.Path) -> dict[str, str]:
    """The text of every paragraph and heading of a page, by its id."""
    page = Paragraphs()
    page.feed(path.read_text())
    return page.texts


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
