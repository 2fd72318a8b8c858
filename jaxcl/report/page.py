"""The report of a run: `report/index.html`, one file that opens from disk and loads nothing, and its figures beside it.

Its only script is that of the map (`report.explorer`).
"""

import base64
import csv
import html
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from etils import epath

from jaxcl.report import duplicates, figures, neighbours, similarities, step_time, transfer, verdict
from jaxcl.report.explorer import explorer
from jaxcl.report.invariance import invariance
from jaxcl.report.style import DPI, Titled
from jaxcl.runtime import storage

logger = logging.getLogger("jaxcl")

# Panel -> (title, caption, how the panel's data is drawn, as a figure or as HTML), in the order of the page.
_SECTIONS: dict[str, tuple[str, str, Callable[[Any], matplotlib.figure.Figure | Titled | str]]] = {
    # First what the owner of the images came for.
    "map": (
        "A map of the images",
        "Images that lie close together look alike to the encoder; distances between islands mean little (t-SNE). "
        "Choose an image, or search for one by name, to see the images most similar to it: by this encoder and, where "
        "they are there, by the pretrained one that it started from and by an untrained one.",
        lambda panel: explorer(**panel),
    ),
    "clusters": (
        "Groups",
        "Images that are alike to the encoder (k-means on the features), the largest group first; in each row the most "
        "typical ones. Point at an image to see its name. images.csv, beside this page, has the group of every image.",
        lambda panel: neighbours.cluster_grid(**panel),
    ),
    "neighbours": (
        "Nearest neighbours",
        "Some test images, and the training images whose features are most similar. What they have in common is what "
        "the encoder relies on: the object itself, or only colour, light and background. If classes are known, a blue "
        "frame marks the same class and an orange frame another one. Point at an image to see its name.",
        lambda panel: neighbours.neighbour_grid(**panel),
    ),
    "near_duplicates": (
        "Near-duplicates",
        "Images of the same structure, compared as wholes and without the encoder: copies in another size, compression "
        "or colour, crops, mirror images, or frames of one scene. Copies in both the training and the test split make "
        "results look too good; many copies of one image give it too much weight in training.",
        duplicates.figure,
    ),
    "odd": (
        "Odd ones out",
        "The images that are least like any other one, the oddest first: broken or misplaced files, rare things, or "
        "things that the encoder does not know.",
        lambda panel: neighbours.odd_grid(**panel),
    ),
    "curves": (
        "Training",
        "Light lines are single measurements, strong lines their running mean; the number is the last value. The loss "
        "should fall and flatten while accuracy rises; if the loss falls but accuracy does not rise, the encoder has "
        "found a shortcut. If images per second drop, or the wait for data is above a few percent, the device was not "
        "kept busy.",
        lambda panel: figures.curves(panel),
    ),
    "views": (
        "What the encoder saw",
        "Each row is one view of the same images. You should still recognise the class in every row: if you cannot, "
        "the augmentation is too strong; if two rows look the same, there is little to learn from the pair. Only "
        "negatives should have lost the object and kept its texture.",
        lambda panel: figures.view_grid(panel["images"], panel.get("labels")),
    ),
    "similarities": (
        "Near and far",
        "How similar the embedding of a view is to its positive, to the negatives made of the same image, and to "
        "other images; darker means more pairs, the line is the mean. The negatives of an image start closer to it "
        "than other images, or there is nothing to learn from them. The further they fall below the positives, the "
        "less the encoder relies on texture.",
        lambda panel: similarities.similarities(panel),
    ),
    "saliency": (
        "Saliency masks",
        "Where the classifier looked, and what the mask kept. A good mask covers the object and leaves the background "
        "out: the two outlines agree. A mask is accepted if the kept pixels alone are still given the right class. "
        "Look at the rejected ones too: they show what the network needed and did not get.",
        lambda panel: figures.saliency_grid(**panel),
    ),
    "adversary": (
        "What the adversary did",
        "The view it started from, what it added (amplified around grey), and the view that the encoder was trained "
        "on. The last row is the other image of the batch that each view came closer to, with the similarity of their "
        "embeddings before and after: the attack makes these pairs confusable. A good adversary changes nothing that "
        "you can see and much of what the encoder sees.",
        lambda panel: figures.adversary_grid(**panel),
    ),
    "invariance": (
        "What each stage is invariant to",
        "The mean cosine between the features of an image and of its transformed copy, at each stage of the network; "
        "1 means invariant. The column on the far right compares two different images. In the upper table the mean of "
        "all features is subtracted first, so 0 means no more alike than any two images; in the lower table it is "
        "not. A ladder of augmentations should show as steps: early stages are invariant to few of them, the last to "
        "all. Features are means over the image, so an early stage hardly sees flips and turns.",
        invariance,
    ),
    "embedding": (
        "The embeddings in two dimensions",
        "A t-SNE picture of the embeddings, scaled to unit length first; colour is the true class. Look for islands of "
        "one colour; the encoder confuses classes that share an island. Distances between islands mean little.",
        lambda panel: figures.embedding(**panel),
    ),
    "transfer": (
        "Classes inside classes",
        "Another t-SNE picture, first by coarse class, then each coarse class enlarged with its fine classes in "
        "colour. Islands of one colour within a coarse class mean that the encoder kept the fine classes apart "
        "without their labels; mixed colours mean that it merged them. Points of other classes are grey.",
        lambda panel: transfer.fine_embedding({"": panel}),
    ),
    "confusion": (
        "Which classes are confused",
        "Rows are true classes, columns predictions; each row adds up to 100%. A perfect encoder has a dark diagonal "
        "and nothing else.",
        lambda panel: figures.confusion(**panel),
    ),
    "reliability": (
        "Is its confidence to be trusted?",
        "Predictions are grouped by their confidence; the height of a bar is the share of them that was right. Bars "
        "that end below the dashed line are overconfident, bars above it underconfident. The strip below shows how "
        "many predictions each group has.",
        lambda panel: figures.reliability(panel),
    ),
    "ood": (
        "Out of domain",
        "A linear probe on images unlike the training images. Shifted and corrupted images still show their objects, "
        "so these bars should be close to the first one. Shuffled patches and texture keep the surface and lose the "
        "shape: there (hatched) a low bar means that the encoder looks at shapes. The shape bias is the share of "
        "decisions for the shape where shape and texture suggest different classes. A dark line marks chance.",
        lambda panel: figures.out_of_domain(panel),
    ),
    "robustness": (
        "Under attack",
        "Every pixel of each test image is moved, by at most the given amount, in the direction that hurts most: in "
        "one step (FGSM) or in many smaller ones (PGD), the stronger attack. The slower accuracy falls and the less "
        "the calibration error grows, the better.",
        lambda panel: figures.robustness(panel),
    ),
    "reliability_fgsm": (
        "Its confidence under attack",
        "The reliability diagram again, on attacked images. Tall shaded parts mean that the network is confident in "
        "answers that the attack has made wrong.",
        lambda panel: figures.reliability(panel),
    ),
}

_OF_THE_OWNER = ("map", "clusters", "neighbours", "near_duplicates", "odd")


def write_report(
    workdir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    panels: Mapping[str, Any],
    images: Mapping[str, int] | None = None,
) -> epath.Path:
    """Write `workdir/report/index.html` and its PNG files.

    A figure that cannot be drawn is named on the page and logged; the rest of the report is still written.

    Args:
      workdir: the run folder.
      config: the whole config; its "name" and "data.source" make the title.
      environment: packages, devices, commit.
      results: nested dict of the final metrics, fractions in [0,1]. The main ones (`verdict`) are explained at the
        top, and all are listed below.
      metrics: what `read_metrics` returns.
      panels: name -> the data of its figure; each may be missing:
        "views": {"images": {view: [n,H,W,C]}, "labels": [n]}; "saliency", "adversary", "embedding", "confusion": the
        arguments of `saliency_grid`, `adversary_grid`, `embedding` and `confusion`; "neighbours", "map",
        "near_duplicates", "clusters", "odd": the arguments of `neighbour_grid`, `explorer`, `duplicates`,
        `cluster_grid` and `odd_grid`; "table": {"columns", "rows"} of images.csv; "transfer": a panel of
        `fine_embedding`; "invariance": the panel of `invariance`; "ood": the rows of `out_of_domain`; "reliability",
        "reliability_fgsm" (on attacked images), "robustness": the argument of the function with that name;
        "step_time": the contents of step_time.json (`jaxcl.train.profile`).
      images: number of images by split, for example {"training": 10000, "test": 2000}.

    Returns:
      The path of the page.
    """
    folder = storage.folder(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _SECTIONS:  # figures of an earlier report must not stay without their section
        (folder / f"{name}.png").unlink(missing_ok=True)
    measured = panels.get("step_time")
    table = panels.get("table")
    if table:
        storage.write_whole(folder / "images.csv", _csv(**table))
    panels = {k: v for k, v in panels.items() if k not in ("step_time", "table")}
    panels = {"curves": metrics, "similarities": similarities.rows(metrics), **panels}
    for name in panels.keys() - _SECTIONS.keys():
        logger.warning("the report has no section for the panel %r", name)
    (folder / duplicates.FILE).unlink(missing_ok=True)
    if _present(panels.get("near_duplicates")):
        duplicates.write_table(folder, panels["near_duplicates"]["rows"])
    sections = {name: _section(folder, name, panels[name]) for name in _SECTIONS if _present(panels.get(name))}

    title = verdict.title(config) or storage.folder(workdir).name
    command = results.get("command") or environment.get("command")
    lead = verdict.sentence(config, results, images or {})
    body = [
        f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>{_note(config)}</header>",
        *_in_order(_verdict_table(results), sections, results),
        step_time.section(measured) if measured else "",
        _table_section("All results", verdict.flatten({k: v for k, v in results.items() if k != "command"})),
        "<section><h2>How it was made</h2>",
        f"<h3>Command</h3><pre>{escape(command)}</pre>" if command else "",
        f"<details><summary>Config</summary><pre>{escape(_json(config))}</pre></details>" if config else "",
        _details_table("Environment", verdict.flatten(environment)) if environment else "",
        "</section>",
    ]
    return write_page(folder / "index.html", title, "\n".join(body))


def write_page(path: str | os.PathLike, title: str, body: str, style: str = "") -> epath.Path:
    """Write an HTML page in the report's style, atomically. `body` is HTML, `style` further CSS. -> `path`."""
    path = epath.Path(path)
    storage.write_whole(path, _PAGE.format(title=escape(title), style=_CSS + style, body=body))
    return path


def _in_order(short: str, sections: Mapping[str, str], results: Mapping[str, Any]) -> list[str]:
    """The table of the main results comes first if it has an accuracy; otherwise after the images of their owner."""
    if verdict.main_accuracies(results) or "map" not in sections:
        return [short, *sections.values()]
    own = [name for name in sections if name in _OF_THE_OWNER]
    return [*(sections[name] for name in own), short, *(sections[name] for name in sections if name not in own)]


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([columns, *rows])
    return out.getvalue()


def _note(config: Mapping[str, Any]) -> str:
    line = duplicates.fit_line(config)
    return f"<p>{escape(line)}</p>" if line else ""


def _present(panel: Any) -> bool:
    return panel is not None and len(panel) > 0


def _section(folder: epath.Path, name: str, panel: Any) -> str:
    title, caption, draw = _SECTIONS[name]
    try:
        drawn = draw(panel)
        if isinstance(drawn, str):
            return _whole(name, title, caption, drawn)
        figure, titles = drawn if isinstance(drawn, Titled) else (drawn, ())
        png = figures.save(figure, folder / f"{name}.png").read_bytes()
    except Exception as error:  # one figure must not cost a long run its report
        if storage.refusal(error):
            raise  # the others cannot be written either
        logger.warning("the figure %r of the report could not be drawn", name, exc_info=True)
        said = f"This figure could not be drawn: {type(error).__name__}: {error}"
        return f'<section id="{name}"><h2>{escape(title)}</h2><p class=missing>{escape(said)}</p></section>'
    # The page shows fewer pixels than the file has: sharp on dense screens. CSS shrinks it on narrow ones.
    width, height = (round(inches * DPI / 1.8) for inches in figure.get_size_inches())
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"  # the page is one file
    picture = f'<img src="{source}" width="{width}" height="{height}" alt="{escape(title)}">'
    if titles:  # positions are shares of the figure's size, which depends on the screen
        over = "".join(
            f'<i title="{escape(text)}" style="left:{100 * x:.2f}%;top:{100 * y:.2f}%;width:{100 * w:.2f}%;'
            f'height:{100 * h:.2f}%"></i>'
            for x, y, w, h, text in titles
        )
        picture = f"<div class=titled>{picture}{over}</div>"
    below = duplicates.below(panel) if name == "near_duplicates" else ""
    return _whole(name, title, caption, f"<figure>{picture}</figure>{below}")


def _whole(name: str, title: str, caption: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2><p>{escape(caption)}</p>{body}</section>'


def _verdict_table(results: Mapping[str, Any]) -> str:
    rows = verdict.rows(results)
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th scope=row>{escape(row.name)}</th><td class=value>{escape(row.value)}</td>"
        f"<td class=better>{escape(row.better)}</td><td>{escape(row.meaning)}</td></tr>"
        for row in rows
    )
    head = "<tr><th>metric</th><th class=value>result</th><th>better</th><th>meaning</th></tr>"
    return (
        f"<section><h2>In short</h2><div class=wide><table class=verdict><thead>{head}</thead>"
        f"<tbody>{cells}</tbody></table></div></section>"
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td class=plain>{escape(_value(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<div class=wide><table class=all>{cells}</table></div>"


def _table_section(title: str, rows: Mapping[str, Any]) -> str:
    return f"<section><h2>{escape(title)}</h2>{_table(rows)}</section>" if rows else ""


def _details_table(title: str, rows: Mapping[str, Any]) -> str:
    return f"<details><summary>{escape(title)}</summary>{_table(rows)}</details>"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.5g}"
    if hasattr(value, "tolist"):
        value = value.tolist()
        if not isinstance(value, list):
            return _value(value)
    if isinstance(value, (list, tuple)):
        if len(value) <= 12 and not any(isinstance(v, (list, tuple, Mapping)) for v in value):
            return ", ".join(_value(v) for v in value)
        return f"({len(value)} values, in results.json)"
    return str(value)


def _json(config: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if hasattr(value, "items"):
            return dict(value.items())
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.dumps(config, indent=2, default=plain, ensure_ascii=False)


def escape(text: Any) -> str:
    """Escape text for HTML and attributes: names of files and classes may contain anything."""
    return html.escape(str(text), quote=True)


_CSS = pathlib.Path(__file__).with_suffix(".css").read_text("utf-8")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: file: 'self'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
