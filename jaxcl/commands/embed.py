"""Write the features of images, computed by a trained run, to a file.

    jaxcl embed --workdir=RUN --out=features.npz [--source=folder:photos] [--split=test] [--layer=z]
    jaxcl embed --workdir=RUN --workdir=RUN --out=gs://bucket/features.parquet

The file has one row per image, for all splits of the source (train, validation, test) or for one of them: the
features, the split, the row in it and, where known, the label, the class and the file. Several run folders, also
written RUN+RUN, are one encoder with their features side by side. Features are written batch by batch; the file
appears when it is complete.

    npz:     features float32 [N,D], splits and index [N] (the row in its split); where known labels int32 [N] (-1:
             none), class_names [K] and paths [N]; about, JSON
    parquet: a column for each of features, split, index, label, class and path
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from jaxcl.commands.feature_files import new_file, writer_for
from jaxcl.errors import UserError
from jaxcl.evaluate.context import FEATURES
from jaxcl.runtime import compile_cache, storage
from jaxcl.runtime.flags import Flags
from jaxcl.train.runs import Joined, Run, load_run

logger = logging.getLogger("jaxcl")

FLAGS = Flags(__doc__)
FLAGS.paths("workdir", "A run folder; give the flag several times to put features side by side.")
FLAGS.path("out", "", "A file that ends in .npz or .parquet; local or gs://.")
FLAGS.text("source", "", "A data source as in a config; default: that of the run.")
FLAGS.number("step", None, "Step of the checkpoint; default: the newest, or the best with eval.state=best.")
FLAGS.text("split", "", "A split such as test; default: train, validation and test.")
FLAGS.text("layer", "", "h: pooled features; z: the embedding; default: eval.features of the config.")


def embed(runs: Sequence[Run], out: str | os.PathLike, *, split: str = "", layer: str = "") -> dict[str, Any]:
    """Write the features of runs, opened by `load_run`, to a file; -> its description, which the file holds as `about`.

    Args:
      runs: several are one encoder with their features side by side.
      out: a file that ends in .npz or .parquet, local or remote; an existing file is replaced.
      split: one split of the source; "": train, validation and test, as far as the source has them.
      layer: "h" (pooled features) or "z" (the embedding at unit length); "": eval.features of the first run.

    An npz file holds `features` float32 [N,D], `splits` and `index` [N] (the row in its split), where known
    `labels` int32 [N] (-1: none), `class_names` [K] and `paths` [N], and `about`, JSON. A parquet file has a column for
    each (features, split, index, label, class, path) and `about` as its metadata "jaxcl". Nothing is pickled.

    Raises:
      UserError: another layer, split or kind of file, or a file that cannot be written.
    """
    write = writer_for(out)
    first = runs[0]
    layer = layer or first.evaluation.options.features
    if layer not in FEATURES:
        known = " or ".join(f"{k!r} ({v})" for k, v in FEATURES.items())
        raise UserError(f"--layer is {layer!r}; expected {known}")
    contexts = {s: Joined(runs, s) if len(runs) > 1 else first.context(s) for s in _splits(first, split)}
    sources = {s: context.test for s, context in contexts.items()}
    N, D = sum(map(len, sources.values())), sum(_width(run, layer) for run in runs)
    about = {
        "runs": [{"workdir": str(r.workdir), "step": r.step, "config": r.config.name} for r in runs],
        "source": first.config.data.source,
        "layer": layer,
        "rows": N,
        "features": D,
        "class_names": next(iter(sources.values())).class_names,
    }
    features = (batch for s, context in contexts.items() for batch in context.stream(sources[s], layer))
    try:
        with new_file(out) as file:
            write(file, features, sources, about)
    except OSError as error:
        raise UserError(f"cannot write {out}: {storage.refusal(error) or error.strerror or error}") from error
    logger.info("%s: %s images, %s features each", out, f"{N:,}", f"{D:,}")
    return about


def _width(run: Run, layer: str) -> int:
    recipe = run.recipe
    count = recipe.features_of if layer == "h" else recipe.embedding_features_of
    return count(recipe.representation)


def _splits(run: Run, split: str) -> tuple[str, ...]:
    source_of = run.evaluation.source
    if split:
        if source_of(split) is None:
            raise UserError(f"--split is {split!r}, which {run.config.data.source} does not have")
        return (split,)
    found = [] if run.evaluation.training is None else ["train"]
    for name in ("validation", "test"):
        try:
            source_of(name)
        except UserError:  # the source does not have this split, which is no mistake
            continue
        found.append(name)
    return tuple(found)


def _folders(given: Sequence[str]) -> list[str]:
    """RUN+RUN names two folders, unless a folder has that name."""
    return [f for text in given for f in ([text] if storage.folder(text).exists() else text.split("+"))]


def main(argv: list[str]) -> int:
    """Embed; -> exit code."""
    given = FLAGS.parse(argv)
    for name in ("workdir", "out"):
        if not getattr(given, name):
            raise UserError(f"no --{name}; expected --workdir=RUN --out=features.npz")
    writer_for(given.out)
    compile_cache.turn_on()
    options = dict(source=given.source, step=given.step, any_part=True)
    opened = [load_run(folder, **options) for folder in _folders(given.workdir)]
    embed(opened, given.out, split=given.split, layer=given.layer)
    return 0
