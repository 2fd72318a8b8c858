"""`folder:PATH`: image files, one folder per class, or all in one folder without labels."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from etils import epath

from jaxcl.data.files import ImageFiles
from jaxcl.data.images import SUFFIXES
from jaxcl.data.listing import SPLIT_OF_WORD, Listing, columns
from jaxcl.data.paths import is_idx, join, root_of, shown
from jaxcl.errors import UserError
from jaxcl.runtime.storage import is_remote

_SYSTEM = ("__MACOSX", "@eaDir")  # copies and thumbnails that systems make; hidden folders are skipped too


@dataclasses.dataclass(frozen=True)
class Folder(ImageFiles):
    """Reads PATH/CLASS/..., or PATH/train/CLASS/..., PATH/test/CLASS/... (or val), or either without class folders.

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
    found, folders, others, idx = [], [], Counter(), False
    for inside, names in _walk(spec, root):
        folders.append(inside)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                found.append((*inside, name))
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

    tops = {name[0] for name in found if len(name) > 1}
    splits = {top: SPLIT_OF_WORD[top.lower()] for top in tops if top.lower() in SPLIT_OF_WORD}
    if set(splits) != tops:
        if "train" in splits.values() and len(splits) > 1:
            stray = shown(min(tops - set(splits)))
            names = " and ".join(sorted(map(shown, splits)))
            raise UserError(f"{spec} holds {names} beside {stray}, which is no split of a set; move one or the other")
        splits = {}  # a class of trains, or of tests
    depth = 1 if splits else 0
    if splits:
        beside = len(found)
        found = [name for name in found if len(name) > 1]
        if beside := beside - len(found):
            notes.append(f"{beside:,} images beside {', '.join(sorted(map(shown, splits)))} are ignored")

    labels = [name[depth] if len(name) > depth + 1 else "" for name in found]
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
    return Listing(
        spec=spec,
        paths=[join(root, "/".join(name)) for name in found],
        names=[shown("/".join(name)) for name in found],
        splits=np.array([splits[name[0]] if splits else "train" for name in found], "U10"),
        columns=columns(len(found), label=np.array([code[label] for label in labels], np.int32)),
        class_names=tuple(map(shown, classes)),
        notes=tuple(notes),
    )


def _walk(spec: str, root: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every folder that is not hidden: its path below the root, in pieces, and the names of its files."""

    root = root.rstrip("/") or "/"

    def failed(error: OSError) -> None:
        raise UserError(f"{spec}: {shown(str(error.filename))} cannot be read ({error.strerror.lower()})")

    if is_remote(root):
        try:
            walked = [(str(f), subfolders, names) for f, subfolders, names in epath.Path(root).walk()]
        except Exception as error:  # the library of that bucket may raise anything
            raise UserError(f"{spec} cannot be read ({' '.join(str(error).split())[:200]})") from error
    else:
        if not os.path.isdir(root):
            what = "is a file" if os.path.exists(root) else "is not there"
            raise UserError(f"{spec}: {root} {what}; expected a folder of images, or of one folder per class")
        walked = os.walk(root, followlinks=True, onerror=failed)
    base = None  # the root as the walk writes it: the libraries of buckets may drop the "gs://"
    above: dict[str, frozenset] = {}  # the real folders above each folder: links may form a circle
    for folder, subfolders, names in walked:
        base = folder.rstrip("/") if base is None else base
        inside = tuple(p for p in folder[len(base) :].split("/") if p)
        if any(p.startswith(".") or p in _SYSTEM for p in inside):
            subfolders.clear()
            continue
        if not is_remote(root):
            real, parent = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
            if real in parent:
                subfolders.clear()
                continue
            above[folder] = parent | {real}
        yield inside, names
