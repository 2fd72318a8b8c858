"""Make a set of textures, one for each image of a source. Training then reads its texture negatives from the set.

    jaxcl textures --source=garments --out=textures
    jaxcl train --config=configs/nonsemantic.py:texture --config.data.textures=textures

Every pixel is copied from one of two squares of its image (`jaxcl.augment.sampling`). The images need no labels. The
same command resumes where it stopped. Several hosts that share the folder can share the work: start the command on
each with --process_index=I --process_count=N, or with --distributed=auto. The texture of an image depends only on the
image's place in the source and on --seed.
"""

import ast
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.augment.sampling import make_search, sample_texture
from jaxcl.data import make_source, texture_set
from jaxcl.errors import UserError
from jaxcl.method.sharding import AXIS
from jaxcl.report.progress import Progress
from jaxcl.runtime import compile_cache, distributed
from jaxcl.runtime.flags import Flags

logger = logging.getLogger("jaxcl")

FLAGS = Flags(__doc__)
FLAGS.text("source", "", "A data source as in a config, such as npz:PATH.")
FLAGS.texts("option", "KEY=VALUE: an option of the source, such as image_size=96; may be given several times.")
FLAGS.text("split", "train", "train or test; a held-out or limited training set uses the same textures.")
FLAGS.path("out", "", "The folder for the textures.")
FLAGS.number("seed", 0, "Seed of all random draws.")
FLAGS.number("batch_size", 32, "Images at a time, over all devices of this host.")
FLAGS.number("part_size", 1024, "Images in a file; a stop loses one unfinished file at most.")
FLAGS.number("exemplar", 0, "Side of the two squares; 0: 96/224 of the image's shorter side.")
FLAGS.number("radius", 0, "Radius of a pixel's neighbourhood; 0: 3, or 2 for small squares.")
FLAGS.number("randoms", 16, "Random places that are tried for a pixel.")
FLAGS.number("passes", 2, "How often each level chooses every pixel.")
FLAGS.number("process_index", 0, "Index of this process among those that share the work.")
FLAGS.number("process_count", 1, "Number of processes that share the work.")
FLAGS.text("distributed", "off", "off, auto or HOST:PORT,COUNT,ID, as for jaxcl train.")


def build(
    source: Any,
    out: str | Path,
    *,
    seed: int = 0,
    batch_size: int = 32,
    part_size: int = 1024,
    search: dict[str, int | None] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    stream: Any = None,
) -> None:
    """Make the files of this process that are missing.

    Args:
      source: the images; labels are not read.
      out: the folder.
      batch_size: images at a time, rounded up to a multiple of this host's devices.
      part_size: images in a file.
      search: options of `jaxcl.augment.sampling.sample_texture`.
      process_index, process_count: this process makes files process_index, process_index + process_count, ...
      stream: where progress is written; None: stderr.

    Raises:
      UserError: options out of range, or a folder of textures that were made with other options.
    """
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index is {process_index}; expected 0 to {process_count - 1}, of {process_count}")
    if min(batch_size, part_size) < 1:
        raise UserError(f"batch_size is {batch_size} and part_size {part_size}; expected at least 1")
    search = search or {}
    made = make_search("textures", source.image_shape, **search)
    out, count = Path(out).expanduser(), len(source)
    parts = range(-(-count // part_size))
    about = {
        "source": source.name,
        "split": source.split,
        "images": count,
        "shape": list(source.image_shape),
        "seed": seed,
        "parts": len(parts),
        "part_size": part_size,
        **made._asdict(),
    }
    texture_set.begin(out, about)

    devices = jax.local_devices()
    batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = jax.sharding.Mesh(np.array(devices)[None], AXIS)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    def sample(index_B, images):
        key = jax.random.key(seed, impl="threefry2x32")
        return sample_texture(jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B), images, **search)

    jitted = jax.jit(sample, in_shardings=(rows, rows), out_shardings=rows)
    own = parts[process_index::process_count]
    batches = {p: range(p * part_size, min((p + 1) * part_size, count), batch_size) for p in own}
    left = [p for p in own if not texture_set.is_done(out, p)]
    done = sum(len(batches[p]) for p in own if p not in left)
    with Progress(
        done + sum(len(batches[p]) for p in left), initial=done, unit_images=batch_size, stream=stream
    ) as bar:
        for p in left:
            images, textures, end = [], [], min((p + 1) * part_size, count)
            for first in batches[p]:
                index = np.arange(first, min(first + batch_size, end))
                image = source.batch(index)["image"]
                padding = batch_size - len(index)  # a constant shape needs only one program
                given = np.pad(index, (0, padding)), np.pad(image, ((0, padding), (0, 0), (0, 0), (0, 0)))
                textures.append(np.asarray(jitted(*jax.device_put(given, rows)))[: len(index)])
                images.append(image)
                done += 1
                bar.update(done)
            texture_set.write_shard(out, p, np.concatenate(images), np.concatenate(textures))


def _options(given: Sequence[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"--option is {text!r}; expected KEY=VALUE, such as image_size=96")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # plain text
            options[key] = value
    return options


def main(argv: list[str]) -> int:
    """Make the textures; -> exit code."""
    given = FLAGS.parse(argv)
    if not given.source or not given.out:
        raise UserError("no --source or no --out; for example --source=garments --out=textures")
    index, count = given.process_index, given.process_count
    if given.distributed == "off":
        compile_cache.turn_on()
    distributed.join(given.distributed)
    if given.distributed != "off":
        index, count = jax.process_index(), jax.process_count()
    source = make_source(given.source, split=given.split, **_options(given.option))
    search = dict(
        exemplar=given.exemplar or None,
        radius=given.radius or None,
        randoms=given.randoms,
        passes=given.passes,
    )
    build(
        source,
        given.out,
        seed=given.seed,
        batch_size=given.batch_size,
        part_size=given.part_size,
        search=search,
        process_index=index,
        process_count=count,
    )
    logger.info("textures of %d images: --config.data.textures=%s", len(source), given.out)
    return 0
