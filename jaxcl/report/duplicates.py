"""The section of near-duplicates: pictures and sizes of the first groups, and duplicates.csv with all of them."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxcl.errors import UserError
from jaxcl.report.neighbours import duplicate_grid
from jaxcl.report.style import Titled
from jaxcl.runtime import storage

if TYPE_CHECKING:
    from jaxcl.evaluate.duplicate_table import Row

FILE = "duplicates.csv"
LISTED = 200  # rows of the table on the page
_FITTED = {
    "crop": "the middle square of each was kept: what lies beyond it at the longer sides was not seen",
    "squash": "both sides were given the same length: all of each image was seen, out of proportion",
    "letterbox": "bars were added: all of each image was seen, smaller",
}


def fit_line(config: Mapping[str, Any]) -> str:
    """One line on how images became squares; "" for data that are no image files."""
    from jaxcl.data import default_fit  # late: it imports JAX, which a command that only writes a page does not need

    data = config.get("data") or {}
    try:
        fit = (data.get("files") or {}).get("fit") or default_fit(data.get("source") or "")
    except UserError:  # a kind of source that is not there any more
        return ""
    return (
        f"Where images had to be resized to squares, {_FITTED[fit]} (data.files.fit: {fit})." if fit in _FITTED else ""
    )


def figure(panel: Mapping[str, Any]) -> Titled:
    """Draw the first groups. panel: as `evaluate.neighbours` makes it."""
    return duplicate_grid(panel["images"], panel["shown"])


def write_table(folder: epath.Path, rows: "Sequence[Row]") -> None:
    """Write duplicates.csv (UTF-8), complete."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(rows[0]._fields)
    out.writerows(row._replace(group=row.group or "", bytes=row.bytes or "") for row in rows)
    storage.write_whole(folder / FILE, text.getvalue())


def below(panel: Mapping[str, Any]) -> str:
    """HTML below the pictures: what is in the file, and the first of its rows."""
    rows, pictured = panel["rows"], len(panel["images"])
    groups = max((row.group for row in rows), default=0)
    outside = sum(not row.group for row in rows)
    said = [
        f"{groups:,} groups with {len(rows) - outside:,} images"
        + (f", and {outside:,} pairs of images that are not in one group" if outside else "")
        + f"; the pictures show the first {min(pictured, max(groups, outside)):,}.",
        "In a group every two images are near-duplicates; the file to keep is the one with the most pixels.",
        "" if panel["complete"] else "There were so many that not all pairs inside the groups have been compared.",
        "Only the middle squares of the images were compared (data.files.fit: crop)." if panel["fit"] == "crop" else "",
    ]
    link = f"{FILE}, beside this page, lists all of them, with sizes and scores."
    cells = "".join(
        f"<tr><td>{row.group or ''}</td><td>{row.keep}</td><td class=plain>{html.escape(row.file)}</td>"
        f"<td>{row.width} x {row.height}</td><td>{f'{row.bytes:,}' if row.bytes else ''}</td>"
        f"<td>{row.score:.2f}</td><td class=plain>{html.escape(row.like)}</td><td>{row.how}</td></tr>"
        for row in rows[:LISTED]
    )
    head = "".join(f"<th>{name}</th>" for name in ("group", "keep", "file", "pixels", "bytes", "score", "like", "how"))
    title = f"The first {LISTED} of {len(rows):,} files" if len(rows) > LISTED else f"All {len(rows)} files"
    return (
        f"<p>{' '.join(filter(None, said))} {link}</p><details><summary>{title}</summary><div class=wide>"
        f"<table class=all><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div></details>"
    )
