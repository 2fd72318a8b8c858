"""Export the encoder of a run as safetensors, with a small JSON file that describes it.

    jaxcl export --workdir=RUN --out=DIR|FILE.safetensors [--encoder=NAME] [--format=torch]

`jaxcl.load_backbone(DIR)` loads it, and `--config.model.weights=DIR` continues training from it. With --format=torch
the file has the parameter names of torchvision's ResNets (`models.torch_layout`): `load_state_dict` takes it if fc is
an Identity.
"""

import json
import logging
import os

import numpy as np
from ml_collections import ConfigDict

import jaxcl
from jaxcl.data import source_of
from jaxcl.data.sources import parse
from jaxcl.errors import UserError
from jaxcl.method.forward import of_encoder, with_targets
from jaxcl.models import weights
from jaxcl.models.backbone import architecture, model_of
from jaxcl.runtime import compile_cache
from jaxcl.runtime.flags import Flags
from jaxcl.train.runs import Saved, open_run

logger = logging.getLogger("jaxcl")

FLAGS = Flags(__doc__)
FLAGS.path("workdir", "", "A run folder.")
FLAGS.path("out", "", "A folder, or a file that ends in .safetensors; local or gs://.")
FLAGS.text("encoder", "", "Name of an encoder or of its moving average; default: the main encoder.")
FLAGS.number("step", None, "Step of the checkpoint; default: the newest, or the best with eval.state=best.")
FLAGS.text("format", "jaxcl", "jaxcl, or torch: names and shapes of torchvision's ResNets.")


def export(saved: Saved, out: str | os.PathLike, *, encoder: str = "", layout: str = "jaxcl") -> os.PathLike:
    """Write one encoder of a run to a file; -> the file.

    Args:
      saved: from `train.runs.open_run`.
      out: a file that ends in .safetensors, or a folder.
      encoder: the name of an encoder or of a moving average (the target of MoCo or BYOL); "": the main encoder.
      layout: "jaxcl" or "torch".

    Raises:
      UserError: no such encoder or layout, or an encoder that the layout cannot express.
    """
    if layout not in weights.LAYOUTS:
        raise UserError(f"--format is {layout!r}; expected {' or '.join(weights.LAYOUTS)}")
    recipe, config = saved.recipe, saved.config
    names = ("", *recipe.encoders, *recipe.targets)
    if encoder not in names:
        raise UserError(
            f"--encoder is {encoder!r}; expected one of {', '.join(map(repr, names))} ('' is the main encoder)"
        )
    followed = recipe.memory[encoder].of if encoder in recipe.targets else encoder
    options = architecture(config.encoders[followed] if followed else config.model)
    model = model_of(options)
    torch = weights.torch_layout(options["kind"]) if layout == "torch" else None
    if torch:
        torch.check(model.encoder)
    trees = (saved.state.params, "params"), (saved.state.batch_stats, "batch_stats")
    params, stats = (of_encoder(with_targets(recipe, tree, saved.state.memory, part), encoder) for tree, part in trees)
    trained = recipe.encoder(encoder)
    variables = weights.flat(trained.encoder_params(params), trained.statistics_of(stats))
    wanted = weights.shapes(model, recipe.image_shape)  # only the clean set of batch norms
    variables = {k: np.asarray(v) for k, v in variables.items() if k in wanted}
    about = {
        "architecture": options,
        "features": model.features,
        "preprocessing": {
            "size": recipe.eval_size,
            "mean": recipe.mean,
            "std": recipe.std,
            "interpolation": recipe.model.input_interpolation,
            "fit": _fit(config),
        },
        "class_names": _class_names(saved),
        "provenance": {
            "name": config.name,
            "encoder": encoder,
            "step": saved.step,
            "source": config.data.source,
            "commit": saved.environment.get("commit", ""),
            "jaxcl": jaxcl.__version__,
            "config": json.loads(config.to_json_best_effort()),
        },
    }
    if torch:
        about["torch"] = torch.changes(model.encoder)
    return weights.write(out, variables, about, torch=torch)


def _fit(config: ConfigDict) -> str:
    """How the run's images became squares. Arrays of other shapes than a square are squashed."""
    try:
        kind, _ = parse(config.data.source)
    except UserError:  # somebody's own source, which is not here; the export does not need it
        return "squash"
    if not kind.keeps_size:
        return "squash"
    return config.data.files.get("fit", "") or getattr(kind, "default_fit", "crop")


def _class_names(saved: Saved) -> tuple[str, ...]:
    if saved.class_names is not None:
        return saved.class_names
    try:
        return source_of(saved.config, "train").class_names
    except UserError as error:
        logger.info("exported without class names: the run did not record them, and %s", error)
        return ()


def main(argv: list[str]) -> int:
    """Export; -> exit code."""
    given = FLAGS.parse(argv)
    for name in ("workdir", "out"):
        if not getattr(given, name):
            raise UserError(f"no --{name}; expected --workdir=RUN --out=DIR")
    compile_cache.turn_on()
    saved = open_run(given.workdir, step=given.step)
    path = export(saved, given.out, encoder=given.encoder, layout=given.format)
    logger.info("%s", path)
    return 0
