"""Builds a set of textures, one for each image of a source, from which texture negatives are then read.

    python -m jaxcl textures --source=garments --out=textures
    python -m jaxcl.main --config=configs/nonsemantic.py:texture --config.data.textures=textures

Every pixel is copied from one of two squares of its image (`jaxcl.augment.sampling`). The images need no labels. The same
command goes on where it stopped; on several hosts that share the folder, each makes its share of the parts: start it
with --process_index=I --process_count=N on each, or with --distributed=auto. What an image becomes depends on its
place in the source and --seed only.
"""

import ast
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache, distributed
from jaxcl.runtime import flags as command_line

logger = logging.getLogger("jaxcl")

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_SOURCE = flags.DEFINE_string("source", "", "A data source as in a config, such as npz:PATH.", **_own)
_OPTION = flags.DEFINE_multi_string("option", [], "KEY=VALUE of the source, such as image_size=96.", **_own)
_SPLIT = flags.DEFINE_string("split", "train", "train or test; hold-outs and limits need no set of their own.", **_own)
_OUT = flags.DEFINE_string("out", "", "The folder of the textures.", **_own)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn at random.", **_own)
_BATCH = flags.DEFINE_integer("batch_size", 32, "Images at once, on all devices of this host.", **_own)
_PART = flags.DEFINE_integer("part_size", 1024, "Images a part; a stop loses one part at most.", **_own)
_EXEMPLAR = flags.DEFINE_integer("exemplar", 0, "Side of the squares; 0: 96/224 of the image's shorter side.", **_own)
_RADIUS = flags.DEFINE_integer("radius", 0, "Of a pixel's neighbourhood; 0: 3, or 2 for small exemplars.", **_own)
_RANDOMS = flags.DEFINE_integer("randoms", 16, "Random places tried for a pixel.", **_own)
_PASSES = flags.DEFINE_integer("passes", 2, "How often a level chooses every pixel.", **_own)
_INDEX = flags.DEFINE_integer("process_index", 0, "Which of the processes this is.", **_own)
_COUNT = flags.DEFINE_integer("process_count", 1, "Processes that share the work.", **_own)
_DISTRIBUTED = flags.DEFINE_string("distributed", "off", "off, auto or HOST:PORT,COUNT,ID; as jaxcl.main.", **_own)


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
    """Makes the parts of this process that are not there yet.

    Args:
      source: the images; labels are not read.
      out: the folder.
      batch_size: images at once, rounded up to a multiple of this host's devices.
      search: options of `jaxcl.augment.sampling.sample_texture`.
      process_index, process_count: parts process_index, process_index + process_count, ... are made.
      stream: of the progress bar or lines; None: stderr.

    Raises:
      UserError: options out of range, or a folder of textures made otherwise.
    """
    import jax
    import numpy as np

    from jaxcl.augment.sampling import make_search, sample_texture
    from jaxcl.data import texture_set
    from jaxcl.method.sharding import AXIS
    from jaxcl.report.progress import Progress

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
                padding = batch_size - len(index)  # constant shapes: one program
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
        except (ValueError, SyntaxError):  # a word
            options[key] = value
    return options


def run(argv: list[str]) -> int:
    """Build what the flags say; -> exit code."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    if not _SOURCE.value or not _OUT.value:
        raise UserError("give --source, such as --source=garments, and --out, the folder of the textures")
    index, count = _INDEX.value, _COUNT.value
    if _DISTRIBUTED.value == "off":
        compile_cache.turn_on()
    distributed.join(_DISTRIBUTED.value)
    import jax  # after the flags are known to be right

    from jaxcl.data import make_source

    if _DISTRIBUTED.value != "off":
        index, count = jax.process_index(), jax.process_count()
    source = make_source(_SOURCE.value, split=_SPLIT.value, **_options(_OPTION.value))
    search = dict(
        exemplar=_EXEMPLAR.value or None,
        radius=_RADIUS.value or None,
        randoms=_RANDOMS.value,
        passes=_PASSES.value,
    )
    build(
        source,
        _OUT.value,
        seed=_SEED.value,
        batch_size=_BATCH.value,
        part_size=_PART.value,
        search=search,
        process_index=index,
        process_count=count,
    )
    logger.info("textures of %d images: --config.data.textures=%s", len(source), _OUT.value)
    return 0


def cli() -> None:
    """Exit codes as those of jaxcl.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
