"""A folder laid out like the cache of the Hugging Face hub."""

import hashlib
import os

HASH = "0123456789abcdef0123456789abcdef01234567"


def add(cache, name, files, *, revision=HASH, branch="main"):
    """Put a model into the cache: blobs by their hash, a snapshot of links to them, a ref -> its folder."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / revision
    for path in (folder / "refs", folder / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    if branch:
        (folder / "refs" / branch).write_text(revision)
    return folder
