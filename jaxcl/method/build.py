"""From a config to a recipe. Whatever cannot work is refused here, in one line, before anything compiles."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxcl.errors import UserError
from jaxcl.method import registry
from jaxcl.method.accumulate import Accumulate
from jaxcl.method.check import check, check_paths
from jaxcl.method.grad_cache import GradCache
from jaxcl.method.optimizers import OptimizerOptions, make_finetune, make_optimizer, make_schedule
from jaxcl.method.recipe import ForwardPass, Recipe
from jaxcl.models.model import make_model
from jaxcl.models.registry import MODELS
from jaxcl.runtime.durations import to_steps
from jaxcl.runtime.options import construct
from jaxcl.runtime.registry import make_part


def data_facts(source: Any) -> dict[str, Any]:
    """The facts of a training source that `build_recipe` takes."""
    return dict(
        num_examples=len(source),
        image_shape=source.image_shape,
        mean=source.mean,
        std=source.std,
        num_classes=source.num_classes,
        labelled=source.labelled,
    )


def build_recipe(
    config: ConfigDict,
    *,
    num_examples: int,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    labelled: bool,
    num_devices: int = 1,
) -> Recipe:
    """Build a recipe from a config and the facts of its data (`data_facts`).

    Errors: UserError, one line that begins with the config key, for whatever cannot work.
    """
    B = config.batch_size
    if B < 1 or B % num_devices:
        raise UserError(f"batch_size {B} does not divide over {num_devices} devices; use a multiple of {num_devices}")
    if B > num_examples:
        raise UserError(f"batch_size {B} is larger than the training set ({num_examples} images); use a smaller one")
    per_epoch = num_examples // B
    unit = dict(steps_per_epoch=per_epoch, batch_size=B)
    steps = to_steps(config.duration, name="duration", **unit)
    if steps < 1:
        raise UserError(f"duration {config.duration!r} is less than one step; expected at least one")

    mean, std = _moments(config.data, mean, std)
    size = config.size or image_shape[0]
    pixels = dict(size=size, mean=mean, std=std)
    views = {n: make_part(f"views.{n}", v, registry.VIEWS, **pixels) for n, v in config.views.items()}
    stages = tuple(make_part(f"stages[{i}]", s, registry.STAGES) for i, s in enumerate(config.stages))
    passes = tuple(construct(f"passes[{i}]", ForwardPass, p) for i, p in enumerate(config.passes))
    terms = {n: make_part(f"terms.{n}", t, registry.TERMS) for n, t in config.terms.items()}
    memory = {n: make_part(f"memory.{n}", m, registry.MEMORY) for n, m in config.memory.items()}

    heads = {n: make_part(f"heads.{n}", h, registry.HEADS) for n, h in config.heads.items()}

    model = make_model(make_part("model", config.model, MODELS))
    encoders = {n: make_model(make_part(f"encoders.{n}", node, MODELS)) for n, node in config.encoders.items()}
    for n, other in encoders.items():
        if other.lora:
            raise UserError(f"encoders.{n}.lora_rank is {other.lora.rank}; expected 0: LoRA is for the main encoder")
    options = construct("optimizer", OptimizerOptions, config.optimizer)
    check_paths("optimizer.constant_lr", options.constant_lr, heads, encoders)
    schedule = make_schedule(options, name="optimizer", steps=steps, **unit)
    finetune = make_finetune(options, model, steps=steps, **unit)
    model = dataclasses.replace(model, frozen_norms=max(model.frozen_norms, finetune.frozen))
    memory_schedule, memory_tx, probe_steps = {}, {}, steps
    for n, node in config.memory.items():
        name = f"memory.{n}.optimizer"
        if not memory[n].trained:
            continue
        probe_options = construct(name, OptimizerOptions, node.get("optimizer", {}))
        if probe_options.constant_lr:
            raise UserError(
                f"{name}.constant_lr is {probe_options.constant_lr}; expected (): a memory part has one rate"
            )
        for key in ("freeze", "layer_decay", "encoder_lr", "head_warmup"):
            given, usual = getattr(probe_options, key), getattr(OptimizerOptions, key)
            if str(given) != str(usual):
                raise UserError(f"{name}.{key} is {given!r}; expected {usual!r}: a memory part has no layers")
        own_steps, own_unit = _own_phase(f"memory.{n}", memory[n], steps, unit)
        probe_steps = max(1, own_steps * own_unit["batch_size"] // B)
        memory_schedule[n] = make_schedule(probe_options, name=name, steps=own_steps, **own_unit)
        memory_tx[n] = make_optimizer(probe_options, memory_schedule[n])

    recipe = Recipe(
        model=model,
        finetune=finetune,
        encoders=encoders,
        representation=tuple(config.representation),
        heads=heads,
        views=views,
        stages=stages,
        stage_kinds=tuple(node.kind.rpartition(":")[2] for node in config.stages),
        stage_starts=tuple(
            to_steps(s.start, name=f"stages[{i}].start", total=steps, **unit) for i, s in enumerate(stages)
        ),
        passes=passes,
        terms=terms,
        memory=memory,
        tx=make_optimizer(options, schedule, finetune),
        schedule=schedule,
        memory_tx=memory_tx,
        memory_schedule=memory_schedule,
        grad_cache=construct("grad_cache", GradCache, config.grad_cache),
        accumulate=construct("accumulate", Accumulate, config.accumulate),
        sharding=config.sharding,
        seed=config.seed,
        batch_size=B,
        steps_per_epoch=per_epoch,
        encoder_steps=steps,
        probe_steps=probe_steps,
        image_shape=(size, size, image_shape[2]),
        eval_size=config.eval.size or size,
        mean=tuple(mean),
        std=tuple(std),
        num_classes=num_classes,
        labelled=labelled,
    )
    check(recipe, num_devices=num_devices)
    return recipe


def _own_phase(where: str, part: Any, steps: int, unit: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Steps of the optimiser of a memory part, and its batches: the encoder's, unless its own phase has others."""
    duration, batch_size = (getattr(part, key, 0) for key in ("duration", "batch_size"))
    if part.schedule != "sequential" or not (duration or batch_size):
        return steps, unit
    B = unit["batch_size"]
    batch_size = batch_size or B
    if B % batch_size:
        raise UserError(f"{where}.batch_size is {batch_size}; expected a divisor of batch_size, {B}")
    updates = to_steps(duration, name=f"{where}.duration", **unit) if duration else steps
    if updates < 1:
        raise UserError(f"{where}.duration {duration!r} is less than one update; expected at least one")
    each = B // batch_size
    return updates * each, dict(steps_per_epoch=unit["steps_per_epoch"] * each, batch_size=batch_size)


def _moments(data: ConfigDict, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[tuple, tuple]:
    """The moments by which images are normalised: data.mean and data.std where given, else those of the source."""
    given = tuple(data.mean), tuple(data.std)
    if not any(given):
        return mean, std
    for key, values in zip(("mean", "std"), given, strict=True):
        if len(values) != len(mean):
            raise UserError(
                f"data.{key} is {values}; expected {len(mean)} numbers, one a channel, in both data.mean and data.std"
            )
    return given
