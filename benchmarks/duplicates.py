"""Planted copies among real images: how many near-duplicates are found, and how many of what is found are none.

    python -m benchmarks.duplicates --images=npz:cifar10.npz --out=FOLDER [--count=2000] [--natural=natural.json]

It needs `pip install imagededup` for the peers, which are left out otherwise. `--images` is any data source. 100 copies
are planted among `--count` images of its training part, on which every threshold is chosen, and among as many of its
test part, on which results are reported. Our threshold is the library's default.

A set of photos has near-duplicates of its own. Every pair that a method reports and that is not planted is written to
FOLDER/unplanted.png and .json, to be looked at. `--natural` names a file {"train": [[row, row], ...], "test": ...} of
those that show the same picture; they count neither as right nor as wrong. The others are errors.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from benchmarks._measure import machine
from benchmarks._planted import KINDS, Planted, judged, plant
from benchmarks._report import markdown
from jaxcl.data import Source, batches, make_source
from jaxcl.data.originals import originals
from jaxcl.evaluate import duplicates, structure

Scored = dict[frozenset[str], float]  # a pair of names -> distance, 0 for the same
LEAST_PRECISION = 0.95  # that a threshold must have where it is chosen
SIZE = 64  # of the squares from which our thumbnails are made, the default of `folder:PATH`


def thumbnails(source: Source) -> np.ndarray:
    """uint8 [N,P] of all images of a source."""
    import jax

    small = jax.jit(lambda image: structure.thumbnail(image.astype(np.float32) / 255))
    found = [np.asarray(small(batch["image"]))[batch["where"]] for batch in batches(source, 512)]
    return np.concatenate(found)


def ours(folder: pathlib.Path, least: float = 0.3) -> Scored:
    """Pairs by jaxcl, as the report of a run finds them."""
    parts = [make_source(f"folder:{folder}", split=split, image_size=SIZE) for split in ("train", "test")]
    names = [name for part in parts for name in part.extras["name"]]
    files = [originals(part) for part in parts]
    aspect = np.concatenate([f.width / f.height for f in files])
    found = duplicates.near_duplicates(np.concatenate([thumbnails(part) for part in parts]), aspect, least=least)
    scored = {frozenset((names[p.first], names[p.second])): 1 - p.score for p in found.pairs}
    same: dict[int, list[int]] = {}
    for i, twin in enumerate(found.twin.tolist()):
        same.setdefault(twin, []).append(i)
    for rows in same.values():
        scored |= {frozenset((names[rows[0]], names[i])): 0.0 for i in rows[1:]}
    return scored


def difference_hash(folder: pathlib.Path, side: int = 16) -> Scored:
    """Pairs by whether neighbouring pixels grow darker: 256 bits, and proportions that differ by at most 10 %."""
    names, bits, aspect = sorted(os.listdir(folder)), [], []
    for name in names:
        with Image.open(folder / name) as image:
            aspect.append(image.width / image.height)
            small = np.asarray(image.convert("L").resize((side + 1, side), Image.Resampling.BILINEAR), np.int16)
        bits.append((small[:, 1:] > small[:, :-1]).reshape(-1))
    x, scored = 2.0 * np.array(bits, np.float32) - 1, {}
    apart = (side**2 - x @ x.T) / 2
    log = np.log(aspect)
    for i, j in np.argwhere(np.triu(apart <= 0.4 * side**2, 1)):
        if abs(log[i] - log[j]) < 0.1:
            scored[frozenset((names[i], names[j]))] = float(apart[i, j])
    return scored


def imagededup(method: str) -> Callable[[pathlib.Path], Scored]:
    """A hash of the package imagededup (64 bits, Hamming distance)."""

    def find(folder: pathlib.Path) -> Scored:
        import imagededup.methods as methods

        hasher = getattr(methods, method)(verbose=False)
        encoded = hasher.encode_images(image_dir=folder, num_enc_workers=0)
        found = hasher.find_duplicates(encoding_map=encoded, max_distance_threshold=24, scores=True, num_dist_workers=0)
        return {frozenset((a, b)): float(d) for a, pairs in found.items() for b, d in pairs if a != b}

    return find


def methods() -> dict[str, tuple[Callable[[pathlib.Path], Scored], float | None]]:
    """Name -> (finder, threshold of its own: the default of its library, None without one)."""
    found = {"jaxcl": (ours, 1 - duplicates.LEAST_SCORE), "dHash 16 x 16, aspect": (difference_hash, None)}
    if importlib.util.find_spec("imagededup"):
        found |= {f"imagededup {name}": (imagededup(name), 10.0) for name in ("PHash", "DHash", "WHash", "AHash")}
    return found


def within(scored: Scored, threshold: float) -> list[frozenset[str]]:
    return [pair for pair, distance in scored.items() if distance <= threshold + 1e-9]


def chosen(scored: Scored, planted: Planted, natural: list) -> float:
    """The threshold with the best recall at the least precision; where none has it, that with the best F1."""
    best, at = (-1.0, -1.0), 0.0
    for threshold in sorted({round(d, 2) for d in scored.values()}):
        found = judged(planted, within(scored, threshold), natural)
        p, r = found["precision"], found["recall"]
        rank = (1 + r, p) if p >= LEAST_PRECISION else (2 * p * r / max(p + r, 1e-9), p)
        if rank > best:
            best, at = rank, threshold
    return at


def measure(sets: Mapping[str, Planted], natural: Mapping[str, list], out: pathlib.Path) -> dict[str, dict]:
    """Every method: its results on the test images, at its own and at the chosen threshold."""
    results, unplanted = {}, {part: set() for part in sets}
    for name, (find, own) in methods().items():
        scored, seconds = {}, 0.0
        for part, planted in sets.items():
            begun = time.monotonic()
            scored[part] = find(planted.folder)
            seconds = time.monotonic() - begun
        tuned = chosen(scored["train"], sets["train"], natural.get("train", []))
        for how, threshold in (("default", own), ("chosen", tuned)):
            if threshold is None or (name == "jaxcl" and how == "chosen"):
                continue
            found = {p: judged(sets[p], within(scored[p], threshold), natural.get(p, [])) for p in sets}
            results[f"{name}, {how} threshold"] = found["test"] | {
                "threshold": threshold,
                "seconds": seconds,
                "on_train": {key: found["train"][key] for key in ("precision", "recall")},
            }
            if how == "chosen" or name == "jaxcl":  # defaults of hashes report thousands
                for part in sets:
                    unplanted[part] |= set(found[part]["false"])
        print(name, {k: (v["precision"], v["recall"]) for k, v in results.items() if k.startswith(name)}, flush=True)
    for part, pairs in unplanted.items():
        _show(sets[part].folder, sorted(pairs)[:400], out / f"unplanted_{part}.png")
        (out / f"unplanted_{part}.json").write_text(json.dumps(sorted(pairs)))
    return results


def _show(folder: pathlib.Path, pairs: list[tuple[str, str]], path: pathlib.Path, side: int = 72) -> None:
    """Pairs as a picture, 16 a row, one image above the other."""
    if not pairs:
        return
    sheet = Image.new("RGB", (16 * (side + 8), -(-len(pairs) // 16) * (2 * side + 12)), "white")
    for i, pair in enumerate(pairs):
        for below, name in enumerate(pair):
            with Image.open(folder / name) as image:
                image = image.convert("RGB").resize((side, side))
            sheet.paste(image, (i % 16 * (side + 8), i // 16 * (2 * side + 12) + below * side))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a data source with a train and a test part")
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--side", type=int, default=128, help="smaller images are enlarged to it")
    parser.add_argument("--natural", default="", help="a JSON file of pairs that are near-duplicates by eye")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    natural = json.loads(pathlib.Path(arguments.natural).read_text()) if arguments.natural else {}
    sets = {}
    for seed, part in enumerate(("train", "test")):
        source = make_source(arguments.images, split=part)
        rows = np.sort(np.random.default_rng(seed).permutation(len(source))[: arguments.count])
        images = source.batch(rows)["image"]
        images = images.repeat(3, -1) if images.shape[-1] == 1 else images
        sets[part] = plant(images, rows.tolist(), out / part, side=arguments.side, seed=seed)
    load = os.getloadavg()[0]
    results = measure(sets, natural, out)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    head = ["", "precision", "recall", *KINDS, "false pairs", "seconds"]
    rows = [
        [name, f"{r['precision']:.3f}", f"{r['recall']:.2f}", *(f"{r['kinds'][kind]:.2f}" for kind in KINDS)]
        + [str(len(r["false"])), f"{r['seconds']:.0f}"]
        for name, r in results.items()
    ]
    about = ", ".join(
        v if k == "processor" else f"{k} {v}" for k, v in machine(("jaxcl", "pillow", "imagededup")).items()
    )
    print(f"{about}. Load average {load:.1f} to {os.getloadavg()[0]:.1f}.\n\n{markdown(head, rows)}")


if __name__ == "__main__":
    main()
