"""`folder:PATH`: image files, one folder per class, or all in one folder without labels."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from etils import epath

from jaxcl.data.files import ImageFiles
from jaxcl.data.images import SUFFIXES
from jaxcl.data.listing import CERTAIN, Listing, columns, split_of, untrained
from jaxcl.data.paths import is_idx, join, read_text, root_of, shown
from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote

# Copies, thumbnails and waste that systems keep, some of them closed to users; hidden folders are skipped too.
_SYSTEM = ("__MACOSX", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN", "RECYCLER")
Name = tuple[str, ...]  # of a file: its path below the root, in pieces


@dataclasses.dataclass(frozen=True)
class Folder(ImageFiles):
    """Reads PATH/CLASS/..., or PATH/train/CLASS/..., PATH/test/CLASS/... (or val), or either without class folders.

    Parts are called train, test, val or eval, also in longer names such as val2017 or test_images. Where all images of
    a part lie in one folder that is no class of training, such as Tiny ImageNet's val/images, they have the classes
    that a file val/...annotations.txt names, or no labels.

    Images deeper in a class folder belong to that class. Classes are numbered in the order of their names, as in
    torchvision. Images beside class folders are unlabelled, and so are all images if there is one class folder only.
    Files without the ending of an image and hidden ones are ignored. Links are followed.

    Options and errors: as of `ImageFiles`.
    """

    def listing(self, path: str) -> Listing:
        return listing_of(path)


def listing_of(path: str) -> Listing:
    """The images of a folder, in the order of their names. Errors: UserError for a path that is no readable folder."""
    spec, root = f"folder:{path}", root_of(path)
    found, folders, others, idx, lists = [], [], Counter(), False, {}
    for inside, names in _walk(spec, root):
        folders.append(inside)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.append((*inside, name))
            elif len(inside) == 1 and name.lower().endswith("annotations.txt"):
                lists[inside[0]] = name
            else:
                others[suffix or "no suffix"] += 1
                idx = idx or is_idx(name)
    found.sort()
    notes = []
    if others:
        kinds = ", ".join(shown(kind) for kind, _ in others.most_common(5))
        notes.append(f"{sum(others.values()):,} other files are ignored ({kinds})")
    if idx and not found:
        notes.append(
            "idx files (MNIST's format) are not read: save `images` and `labels` as an npz file and use npz:PATH"
        )

    splits = _splits(spec, found)
    depth = 1 if splits else 0
    if splits:
        beside = len(found)
        found = [name for name in found if len(name) > 1]
        if beside := beside - len(found):
            notes.append(f"{beside:,} images beside {', '.join(sorted(map(shown, splits)))} are ignored")

    labels = [name[depth] if len(name) > depth + 1 else "" for name in found]
    trained = {label for name, label in zip(found, labels, strict=True) if splits.get(name[0]) == "train"} - {""}
    for top in sorted(splits) if trained else ():
        rows = [i for i, name in enumerate(found) if name[0] == top]
        inside = {labels[i] for i in rows}
        if len(inside) == 1 and not inside & trained and (top in lists or "" not in inside):
            known = _classes_of(spec, join(root, f"{top}/{lists[top]}")) if top in lists else {}
            for i in rows:
                labels[i] = known.get(found[i][-1], "")
            what = "has the classes of " + shown(lists[top]) if top in lists else "is no class of training"
            notes.append(f"{shown('/'.join((top, *inside)).rstrip('/'))} {what}")
    classes = sorted(set(labels) - {""})
    if len(classes) == 1:
        notes.append(f"one folder of images, {shown(classes[0])}, gives no labels")
        labels, classes = [""] * len(found), []
    elif classes:
        empty = {f[depth] for f in folders if len(f) == depth + 1 and (not depth or f[0] in splits)} - set(classes)
        if empty:
            notes.append(f"no image in {', '.join(sorted(map(shown, empty)))}, which is left out as a class")
        if without := labels.count(""):
            notes.append(f"{without:,} images lie in no class folder and have no label")
    code = {name: i for i, name in enumerate(classes)} | {"": -1}
    numbers = np.array([code[label] for label in labels], np.int32)
    parts = np.array([splits[name[0]] if splits else "train" for name in found], "U10")
    class_names = tuple(map(shown, classes))
    return Listing(
        spec=spec,
        paths=[join(root, "/".join(name)) for name in found],
        names=[shown("/".join(name)) for name in found],
        splits=parts,
        columns=columns(len(found), label=numbers),
        class_names=class_names,
        notes=(*notes, *untrained(parts, numbers, class_names)),
    )


def _splits(spec: str, found: list[Name]) -> dict[str, str]:
    """The split of each folder at the top; {} where these are classes, or there are none. Errors: UserError."""
    tops = {name[0] for name in found if len(name) > 1}
    splits = {top: split_of(top) for top in sorted(tops) if split_of(top)}
    certain = {top for top in splits if top.lower() in CERTAIN}
    train = next((top for top, split in splits.items() if split == "train"), None)
    strays = sorted(tops - set(splits))
    if not strays:
        return splits if certain == tops or (train and len(set(splits.values())) > 1) else {}
    if train and len(certain) > 1:
        names = " and ".join(map(shown, splits))
        raise UserError(
            f"{spec} holds {names} beside {shown(strays[0])}, which is no split of a set; move one or the other"
        )
    inside = {top: {name[1] for name in found if name[0] == top and len(name) > 2} for top in tops}
    if train in certain and (same := [top for top in strays if inside[top] & inside[train]]):
        raise UserError(
            f"{spec} holds {shown(train)} beside {shown(same[0])} with the same folders in them; parts of a set are "
            "called train, test, val or eval: rename it, or, if both are classes, the folders in them"
        )
    return {}  # a class of trains, or of tests


def _classes_of(spec: str, path: str) -> dict[str, str]:
    """{file: class} of a list with a line for each image, such as Tiny ImageNet's. Errors: UserError."""
    lines = [line.split("\t" if "\t" in line else None) for line in read_text(spec, path).splitlines()]
    return {line[0].strip(): line[1].strip() for line in lines if len(line) > 1}


def _walk(spec: str, root: str) -> Iterator[tuple[Name, list[str]]]:
    """Every folder that is not hidden: its path below the root, in pieces, and the names of its files."""
    root = root.rstrip("/") or "/"
    if not is_remote(root):
        yield from _walk_disk(spec, root)
        return
    try:
        walked = [(str(f), names) for f, _, names in epath.Path(root).walk()]
    except Exception as error:  # the library of that bucket may raise anything
        raise UserError(f"{spec} cannot be read ({' '.join(str(error).split())[:200]})") from error
    base = walked[0][0].rstrip("/") if walked else ""  # the libraries of buckets may drop the "gs://"
    for folder, names in walked:
        inside = tuple(p for p in folder[len(base) :].split("/") if p)
        if not any(map(_skipped, inside)):
            yield inside, names


def _skipped(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM


def _walk_disk(spec: str, root: str) -> Iterator[tuple[Name, list[str]]]:
    """`_walk` on a disk. A link is followed unless its folder is read anyway, or was, on the way of the same link."""
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "is not there"
        raise UserError(f"{spec}: {root} {what}; expected a folder of images, or of one folder per class")
    top = os.path.realpath(root)
    # Each with its path below the root, its real path, and the real folders seen since the first link on its way.
    todo: list[tuple[Name, str, set[str] | None]] = [((), top, None)]
    while todo:
        inside, real, seen = todo.pop()
        names = []
        try:
            with os.scandir(real) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    if not _is_folder(entry):
                        names.append(entry.name)
                    elif not _skipped(entry.name):
                        target, within = os.path.join(real, entry.name), seen
                        if entry.is_symlink():
                            target = os.path.realpath(target)
                            if _below(target, top):
                                continue
                            within = set() if seen is None else seen
                        if within is not None:
                            if target in within:
                                continue
                            within.add(target)
                        todo.append(((*inside, entry.name), target, within))
        except OSError as error:
            shown_path = shown("/".join((root, *inside)))
            raise UserError(f"{spec}: {shown_path} cannot be read ({(error.strerror or str(error)).lower()})") from None
        yield inside, names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; the name is then that of a file that cannot be read
        return False


def _below(folder: str, top: str) -> bool:
    """Whether a real folder is the top or lies below it where the walk comes by without a link."""
    inside = os.path.relpath(folder, top).split("/")
    return inside[0] != ".." and (inside == ["."] or not any(map(_skipped, inside)))
