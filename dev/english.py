"""
English prose for studies, from two Debian packages: novels by Jane Austen, and An Anarchist FAQ.

    apt-get download anarchism=15.3-3 r-cran-janeaustenr=1.0.0-1  # of Debian 12
    for package in anarchism_*.deb r-cran-janeaustenr_*.deb; do dpkg -x $package unpacked; done
    python dev/english.py unpacked data/english.jsonl
    python prepare_data.py --files data/english.jsonl --tokenizer bytes --name english

Both packages hold the texts; nothing else is fetched. The novels are in the public domain (the
package is MIT), the FAQ is GPL-2. A document is a chapter of a novel or a section of the FAQ.
"""

import gzip
import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
FAQ = "usr/share/doc/anarchism/markdown"
# Earlier versions of sections F and H: their text would be in both splits.
EARLIER_VERSIONS = ("append13", "append41")
SHORTEST = 500  # characters; anything shorter is a title page or a list of contents


def main(unpacked, out):
    documents = novels(unpacked / NOVELS) + faq(unpacked / FAQ)
    documents = [text for text in documents if len(text) >= SHORTEST]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(lines)
    characters = sum(map(len, documents))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    print(f"{out}: {len(documents):,} documents, {characters:,} characters, sha256 {digest}")


# ---- the novels ----------------------------------------------------------------------------------
# R's lazy-load file: records of (length, zlib stream), each a serialised character vector.


def novels(path):
    """-> the chapters of the six novels."""
    packed, chapters = path.read_bytes(), []
    while packed:
        stream = zlib.decompressobj()
        record = stream.decompress(packed[4:])
        packed = stream.unused_data
        text = "\n".join(character_vector(record))
        chapters += re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME) \w+\.?\n)", text)
    return [chapter.strip() + "\n" for chapter in chapters]


def character_vector(record):
    """record: R's serialisation, version 3, big-endian, of a character vector. -> list of str."""
    (name_length,) = struct.unpack_from(">i", record, 14)  # of the native encoding, UTF-8
    kind, count = struct.unpack_from(">2i", record, 18 + name_length)
    assert kind & 0xFF == 16, f"type {kind & 0xFF} is no character vector"
    position, strings = 26 + name_length, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", record, position + 4)  # after the string's flags
        position += 8
        strings.append(record[position : position + length].decode())
        position += length
    return strings


# ---- the FAQ -------------------------------------------------------------------------------------
# Markdown: a file for each chapter, with a heading above each section.


def faq(folder):
    """-> the sections of the FAQ and of its appendices."""
    sections = []
    for path in sorted([*folder.glob("sec*.md*"), *folder.glob("append*.md*")]):
        if path.name.startswith(EARLIER_VERSIONS):
            continue
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        text = re.sub(r"\[([^][]*)\]\([^()]*\)", r"\1", text)  # a link becomes its words
        sections += re.split(r"\n(?=#+ )", text)
    return [section.strip() + "\n" for section in sections]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
