"""`folder:PATH`: image files, one folder a class, or all in one without labels."""

import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from etils import epath

from jaxcl.data import files
from jaxcl.data.base import Select, Source
from jaxcl.data.disk import DiskSource
from jaxcl.data.images import SUFFIXES
from jaxcl.errors import UserError

OWN_VALIDATION = True
_SYSTEM = ("__MACOSX", "@eaDir")  # copies and thumbnails that systems leave behind, beside all that begins with a dot


def load(
    path: str,
    *,
    split: str,
    part: str,
    select: Select,
    image_size: int | None = None,
    on_bad_image: str = "raise",
) -> Source | DiskSource:
    """Reads PATH/CLASS/..., or PATH/train/CLASS/..., PATH/test/CLASS/... (or val), or either without class folders.

    What lies deeper in a class folder belongs to it. Classes are numbered in the order of their names, as torchvision
    does. Images beside class folders are unlabelled, and so are all if there is one folder of them. Files that are not
    called images and hidden ones are left alone. Links are followed.

    Args and errors: as `files.load`.
    """
    listing = listing_of(path)
    return files.load(listing, split=split, part=part, select=select, image_size=image_size, on_bad_image=on_bad_image)


def listing_of(path: str) -> files.Listing:
    """The images of a folder, in the order of their names. Errors: UserError for what is no readable folder."""
    spec, root = f"folder:{path}", path if files.is_remote(path) else os.path.expanduser(path)
    found, folders, others = [], [], Counter()
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
    found.sort()
    notes = []
    if others:
        kinds = ", ".join(files.shown(kind) for kind, _ in others.most_common(5))
        notes.append(f"{sum(others.values()):,} other files are left alone ({kinds})")

    tops = {name[0] for name in found if len(name) > 1}
    parts = {top: files.PART_OF_WORD[top.lower()] for top in tops if top.lower() in files.PART_OF_WORD}
    if set(parts) != tops:
        if "train" in parts.values() and len(parts) > 1:
            stray = files.shown(min(tops - set(parts)))
            names = " and ".join(sorted(map(files.shown, parts)))
            raise UserError(f"{spec} holds {names} beside {stray}, which is no part of a set; move one or the other")
        parts = {}  # a class of trains, or of tests
    depth = 1 if parts else 0
    if parts:
        beside = len(found)
        found = [name for name in found if len(name) > 1]
        if beside := beside - len(found):
            notes.append(f"{beside:,} images beside {', '.join(sorted(map(files.shown, parts)))} are left alone")

    labels = [name[depth] if len(name) > depth + 1 else "" for name in found]
    classes = sorted(set(labels) - {""})
    if len(classes) == 1:
        notes.append(f"one folder of images, {files.shown(classes[0])}, says nothing about them: no labels")
        labels, classes = [""] * len(found), []
    elif classes:
        empty = {f[depth] for f in folders if len(f) == depth + 1 and (not depth or f[0] in parts)} - set(classes)
        if empty:
            notes.append(f"no image in {', '.join(sorted(map(files.shown, empty)))}, which is left out as a class")
        if without := labels.count(""):
            notes.append(f"{without:,} images lie in no class folder and have no label")
    code = {name: i for i, name in enumerate(classes)} | {"": -1}
    return files.Listing(
        spec=spec,
        paths=[files.join(root, "/".join(name)) for name in found],
        names=[files.shown("/".join(name)) for name in found],
        parts=np.array([parts[name[0]] if parts else "train" for name in found], "U10"),
        columns=files.columns(len(found), label=np.array([code[label] for label in labels], np.int32)),
        class_names=tuple(map(files.shown, classes)),
        notes=tuple(notes),
    )


def _walk(spec: str, root: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every folder that is not hidden, as its place below the root, with the names of its files."""

    root = root.rstrip("/") or "/"

    def failed(error: OSError) -> None:
        raise UserError(f"{spec}: {files.shown(str(error.filename))} cannot be read ({error.strerror.lower()})")

    if files.is_remote(root):
        try:
            walked = [(str(f), subfolders, names) for f, subfolders, names in epath.Path(root).walk()]
        except Exception as error:  # whatever the library of that bucket raises
            raise UserError(f"{spec} cannot be read ({' '.join(str(error).split())[:200]})") from error
    else:
        if not os.path.isdir(root):
            what = "is a file" if os.path.exists(root) else "is not there"
            raise UserError(f"{spec}: {root} {what}; expected a folder of images or of folders of them")
        walked = os.walk(root, followlinks=True, onerror=failed)
    base = None  # the root as the walk writes it: buckets' libraries may drop the "gs://"
    above: dict[str, frozenset] = {}  # the real folders that lead to one: links may go round in a circle
    for folder, subfolders, names in walked:
        base = folder.rstrip("/") if base is None else base
        inside = tuple(p for p in folder[len(base) :].split("/") if p)
        if any(p.startswith(".") or p in _SYSTEM for p in inside):
            subfolders.clear()
            continue
        if not files.is_remote(root):
            real, parent = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
            if real in parent:
                subfolders.clear()
                continue
            above[folder] = parent | {real}
        yield inside, names
