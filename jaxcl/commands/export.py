"""Take the encoder of a run out: safetensors, with a small JSON that says what it is.

    python -m jaxcl export --workdir=RUN --out=DIR|FILE.safetensors [--encoder=NAME] [--format=torch]

`jaxcl.load_backbone(DIR)` loads it, and `--config.model.weights=DIR` trains on from it. Written with --format=torch it
has the names of torchvision's ResNets (`models.torch_layout`), for `load_state_dict` with fc = Identity.
"""

import json
import logging
import os
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

import jaxcl
from jaxcl.errors import UserError
from jaxcl.runtime import compile_cache
from jaxcl.runtime import flags as command_line

if TYPE_CHECKING:
    from jaxcl.train.runs import Saved

logger = logging.getLogger("jaxcl")

_FLAGS = flags.FlagValues()
_own = dict(flag_values=_FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", "", "A run folder.", **_own)
_OUT = flags.DEFINE_string("out", "", "A folder, or a file that ends in .safetensors; local or gs://.", **_own)
_ENCODER = flags.DEFINE_string("encoder", "", "An encoder by name, a moving average too; default: the main.", **_own)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.", **_own)
_FORMAT = flags.DEFINE_string("format", "jaxcl", "jaxcl, or torch: names and shapes of torchvision's ResNets.", **_own)


def export(saved: "Saved", out: str | os.PathLike, *, encoder: str = "", layout: str = "jaxcl") -> os.PathLike:
    """Write an encoder of an opened run; -> the file.

    Args:
      saved: from `evaluate.runs.open_run`.
      out: a file that ends in .safetensors, or a folder.
      encoder: its name, "" the main one; a moving average (the target of MoCo or BYOL) by its own.
      layout: "jaxcl" or "torch".

    Raises:
      UserError: no such encoder or layout, or one that the layout cannot express.
    """
    from jaxcl.method.forward import of_encoder, with_targets
    from jaxcl.models import weights
    from jaxcl.models.backbone import architecture, model_of

    if layout not in weights.LAYOUTS:
        raise UserError(f"--format is {layout!r}; expected {' or '.join(weights.LAYOUTS)}")
    recipe, config = saved.recipe, saved.config
    names = ("", *recipe.encoders, *recipe.targets)
    if encoder not in names:
        raise UserError(f"--encoder is {encoder!r}; expected one of {', '.join(map(repr, names))} ('' is the main one)")
    followed = recipe.memory[encoder].of if encoder in recipe.targets else encoder
    options = architecture(config.encoders[followed] if followed else config.model)
    model = model_of(options)
    torch = weights.torch_layout(options["kind"]) if layout == "torch" else None
    if torch:
        torch.check(model.encoder)
    trees = (saved.state.params, "params"), (saved.state.batch_stats, "batch_stats")
    params, stats = (of_encoder(with_targets(recipe, tree, saved.state.memory, part), encoder) for tree, part in trees)
    variables = weights.flat(params["encoder"], recipe.encoder(encoder).statistics_of(stats))
    wanted = weights.shapes(model, recipe.image_shape)  # without further sets of batch norms
    variables = {k: np.asarray(v) for k, v in variables.items() if k in wanted}
    about = {
        "architecture": options,
        "features": model.features,
        "preprocessing": {"size": recipe.image_shape[0], "mean": recipe.mean, "std": recipe.std},
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


def _class_names(saved: "Saved") -> tuple[str, ...]:
    if saved.class_names is not None:
        return saved.class_names
    from jaxcl.data import source_of

    try:
        return source_of(saved.config, "train").class_names
    except UserError as error:
        logger.info("without class names: the run did not write them down, and %s", error)
        return ()


def run(argv: list[str]) -> int:
    """Export; -> exit code."""
    _FLAGS.unparse_flags()
    command_line.parse(argv, _FLAGS)
    for name, flag in (("workdir", _WORKDIR), ("out", _OUT)):
        if not flag.value:
            raise UserError(f"no --{name}; expected --workdir=RUN --out=DIR")
    from jaxcl.train.runs import open_run  # after the flags are known to be right

    compile_cache.turn_on()
    saved = open_run(_WORKDIR.value, step=_STEP.value)
    path = export(saved, _OUT.value, encoder=_ENCODER.value, layout=_FORMAT.value)
    logger.info("%s", path)
    return 0


def cli() -> None:
    """Exit codes as those of jaxcl.main."""
    command_line.leave(run)


if __name__ == "__main__":
    cli()
