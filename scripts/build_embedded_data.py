"""Make the embedded data sets from the source distribution of vaderSentiment 3.3.2 (PyPI, MIT
licence).

    python scripts/build_embedded_data.py vaderSentiment-3.3.2.tar.gz [FOLDER]

Each set comes as two files, one with id, mean rating and text, one with id, mean rating, deviation
and the list of ratings. Both have the same ids; their orders and 199 means of the tweets differ. We
keep the order of the ratings, in which blocks of 30 movie reviews share their raters, and drop the
means: the ratings' own mean is exact. Text is UTF-8 (one file with a byte-order mark, which we
drop); HTML entities are resolved and outer white space is cut, nothing else. A line of ours has
`ratings` as one digit a rater, the rating plus 4.
"""

from __future__ import annotations

import bz2
import html
import io
import json
import sys
import tarfile
from pathlib import Path

SETS = {
    "movie_reviews": ("movieReviewSnippets", 10_605),
    "product_reviews": ("amazonReviewSnippets", 3_708),
    "editorials": ("nytEditorialSnippets", 5_190),
    "tweets": ("tweets", 4_200),
}
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def open_inner(archive: Path) -> tarfile.TarFile:
    """The archive of the data sets, which lies inside the package's."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        return tarfile.open(fileobj=io.BytesIO(inner.read()))


def table(archive: tarfile.TarFile, stem: str) -> dict[str, list[str]]:
    """The columns after the id, by id, in the file's order."""
    member = archive.extractfile(f"hutto_ICWSM_2014/{stem}.txt")
    assert member is not None
    lines = member.read().decode("utf-8-sig").splitlines()
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert len(rows) == len(lines), f"{stem}: an id stands twice"
    return rows


def lines(archive: tarfile.TarFile, stem: str) -> list[str]:
    """One JSON line a sentence."""
    texts, raters = table(archive, f"{stem}_GroundTruth"), table(archive, f"{stem}_anonDataRatings")
    assert texts.keys() == raters.keys()
    made = []
    for key, (mean, _, listed) in raters.items():
        ratings: list[int] = json.loads(listed)
        assert all(-4 <= r <= 4 for r in ratings)
        assert abs(sum(ratings) / len(ratings) - float(mean)) < 1e-6
        text = html.unescape(html.unescape(texts[key][1])).strip()  # eight are escaped twice
        row = {"id": key, "text": text, "ratings": "".join(str(r + 4) for r in ratings)}
        made.append(json.dumps(row, ensure_ascii=False))
    return made


def main(archive: Path, folder: Path) -> None:
    """Write the files; bz2 is a third smaller here than gzip, and holds no time."""
    with open_inner(archive) as inner:
        for name, (stem, count) in SETS.items():
            made = lines(inner, stem)
            assert len(made) == count
            packed = bz2.compress(("\n".join(made) + "\n").encode(), 9)
            (folder / f"{name}.jsonl.bz2").write_bytes(packed)
            print(f"{name}: {count} sentences, {len(packed)} bytes")


if __name__ == "__main__":
    here = Path(__file__).parent.parent / "peftcli" / "data" / "embedded"
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else here)
