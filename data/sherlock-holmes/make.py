"""Cut the three texts of this folder out of two corpora: python data/sherlock-holmes/make.py FOLDER

FOLDER holds standardebooks_cc0.txt.xz and gutenberg_children.txt.xz with their .index.tsv (what they are: README.md here). A text is
written with one paragraph a line; test.txt and ordinary.txt are the first paragraphs that fit into 26,000 bytes.
"""

import argparse
import csv
import lzma
from pathlib import Path

HERE = Path(__file__).parent
STORIES = ["a-scandal-in-bohemia", "the-redheaded-league", "the-adventure-of-the-blue-carbuncle"]
TEST = "a-case-of-identity"
ORDINARY = "The Golden Road"
BYTES = 26_000


def book(folder: Path, corpus: str, name: str) -> str:
    with open(folder / f"{corpus}.index.tsv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if Path(row["source_path"]).stem == name]
    if len(rows) != 1:
        raise SystemExit(f"{corpus} has {len(rows)} texts called {name!r}, not one")
    with lzma.open(folder / f"{corpus}.txt.xz") as file:
        content = file.read()
    return content[int(rows[0]["byte_start"]) : int(rows[0]["byte_end"])].decode("utf-8").strip() + "\n"


def beginning(text: str) -> str:
    kept, size = [], 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode("utf-8"))
        if size > BYTES:
            break
        kept.append(line)
    return "".join(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    texts = {
        "train.txt": "<|endoftext|>".join(book(folder, "standardebooks_cc0", name) for name in STORIES),
        "test.txt": beginning(book(folder, "standardebooks_cc0", TEST)),
        "ordinary.txt": beginning(book(folder, "gutenberg_children", ORDINARY)),
    }
    for name, text in texts.items():
        (HERE / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(text.encode('utf-8')):,} bytes")


if __name__ == "__main__":
    main()
