"""Schedules and optimisers. Each optimiser counts its own steps, so two of them can take turns in one TrainState.

e epoch counted from 1, E epochs, S steps per epoch.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxcl.errors import UserError
from jaxcl.method.finetune import FineTune, frozen_layer
from jaxcl.models import Model
from jaxcl.runtime.durations import to_steps
from jaxcl.runtime.options import POSITIVE, Options, Range

logger = logging.getLogger("jaxcl")
Array = jax.Array
Schedule = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(Options):
    """Options of an optimiser in a config: `optimizer` and `memory.NAME.optimizer`."""

    kind: Literal["sgd", "adam", "adamw", "torch_adamw", "lars"] = "sgd"
    lr: Annotated[float, POSITIVE] = 0.5  # peak learning rate; it is never rescaled by the batch size
    momentum: float = 0.9  # sgd, lars
    betas: Annotated[tuple[float, float], Range(0, below=1)] = (0.9, 0.999)  # adam: decay of the mean and the square
    eps: Annotated[float, POSITIVE] = 1e-8  # all kinds of adam: added to the root of the mean square
    # sgd, adam: added to the gradient of all parameters; adamw, lars: matrices only; torch_adamw: all parameters.
    weight_decay: float = 1e-4
    # cosine: per step; epoch_cosine, epoch_steps: SupCon code; epoch_factors: CLAE code; released: Thanos code.
    schedule: Literal["constant", "cosine", "epoch_cosine", "epoch_steps", "epoch_factors", "released"] = "epoch_cosine"
    cosine_epochs: Annotated[int, Range(0)] = 0  # released: epochs from lr down to 0, then up again; 0: the whole run
    warmup: str = "0"  # linear, any duration
    warmup_from: float = 0.0  # learning rate at the first step of the warm-up
    decay_rate: float = 0.1  # epoch_cosine ends at lr * decay_rate**3; epoch_steps multiplies by it
    decay_epochs: Sequence[int] = ()  # epoch_steps, epoch_factors: after each of these epochs
    decay_factors: Sequence[float] = ()  # epoch_factors: from then on the rate is lr times this, one for each epoch
    clip_norm: Annotated[float, Range(0)] = 0.0  # the global gradient norm is clipped to this; 0: not clipped
    trust_coefficient: Annotated[float, POSITIVE] = 1e-3  # lars: a matrix moves by lr * this * its norm, a step
    # lars: the local rate, trust_coefficient * norm of the parameters / norm of the gradient, is at most lr, and is not
    # multiplied by lr (LARC). Recipes for small sets clip, with a coefficient of 0.02.
    clip_trust: bool = False
    constant_lr: Sequence[str] = ()  # parameters that keep the rate lr: "heads/predictor" (SimSiam), "encoder", ...
    # ---- training on from weights (method/finetune.py); of the main encoder, and not of memory parts
    freeze: str = ""  # layers that are not trained, from the input to this one: stem, stage2, layer5, 70%, encoder
    encoder_lr: Annotated[float, POSITIVE] = 1.0  # the rate of the encoder is lr times this; heads have lr
    # The rate of a layer is lr * encoder_lr * layer_decay**(layers behind it); 0: as usual for its kind (ViT: 0.7).
    layer_decay: Annotated[float, Range(0, at_most=1)] = 1.0
    head_warmup: str = "0"  # any duration, from the start on, in which everything but the encoder is trained


def epoch_cosine(
    lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    decay_rate: float = 0.1,
    warmup_steps: int = 0,
    warmup_from: float = 0.01,
) -> Schedule:
    """Cosine that changes once an epoch, to lr * decay_rate**3, with a linear warm-up by steps.

    lr(e) = eta + (lr - eta)(1 + cos(pi e / E)) / 2, eta = lr * decay_rate**3, so epoch 1 is already below lr.
    The warm-up, in whole epochs, ends at the cosine's value at its last epoch. Source: the released SupCon code.
    """
    eta = lr * decay_rate**3

    def cosine(e: Array) -> Array:
        return eta + (lr - eta) * (1 + jnp.cos(jnp.pi * e / epochs)) / 2

    return _with_epoch_warmup(cosine, steps_per_epoch, warmup_steps, warmup_from, after=cosine)


def epoch_steps(
    lr: float,
    *,
    decay_epochs: Sequence[int],
    steps_per_epoch: int,
    decay_rate: float = 0.1,
    warmup_steps: int = 0,
    warmup_from: float = 0.01,
) -> Schedule:
    """lr * decay_rate**(number of milestones strictly below the epoch), with a linear warm-up to lr by steps."""
    milestones = jnp.asarray(tuple(decay_epochs) or (jnp.inf,))

    def value(e: Array) -> Array:
        return lr * decay_rate ** jnp.sum(milestones < e)

    return _with_epoch_warmup(value, steps_per_epoch, warmup_steps, warmup_from, after=lambda e: jnp.float32(lr))


def epoch_factors(
    lr: float,
    *,
    decay_epochs: Sequence[int],
    decay_factors: Sequence[float],
    steps_per_epoch: int,
    warmup_steps: int = 0,
    warmup_from: float = 0.01,
) -> Schedule:
    """lr, and lr * decay_factors[i] once decay_epochs[i] epochs are over, with a linear warm-up to lr by steps.

    Factors multiply lr, not the rate before: (0.1, 0.05) halves it the second time. Source: the released CLAE code of
    Plain and UEL (arXiv 2010.12050), whose epochs count from 0.
    """
    milestones = jnp.asarray(tuple(decay_epochs) or (jnp.inf,))
    factors = jnp.asarray((1.0, *decay_factors))

    def value(e: Array) -> Array:
        return lr * factors[jnp.sum(milestones < e)]

    return _with_epoch_warmup(value, steps_per_epoch, warmup_steps, warmup_from, after=lambda e: jnp.float32(lr))


def epoch_wave(
    lr: float, *, cosine_epochs: int, steps_per_epoch: int, warmup_steps: int = 0, warmup_from: float = 0.01
) -> Schedule:
    """Cosine that changes once an epoch: from lr down to 0 in cosine_epochs, up again in as many, and so on.

    lr(e) = lr (1 + cos(pi (e - 1) / cosine_epochs)) / 2, so epoch 1 has lr itself and a run of whole periods of
    2 cosine_epochs ends near it. The warm-up, in whole epochs, ends at the cosine's value at its last epoch. Source:
    the released Thanos code (arXiv 2204.07596), where the period stays at 100 epochs in runs of 600.
    """

    def cosine(e: Array) -> Array:
        return lr * (1 + jnp.cos(jnp.pi * (e - 1) / cosine_epochs)) / 2

    return _with_epoch_warmup(cosine, steps_per_epoch, warmup_steps, warmup_from, after=cosine)


def _with_epoch_warmup(value: Schedule, steps_per_epoch: int, steps: int, start: float, after: Schedule) -> Schedule:
    def schedule(step: Array) -> Array:
        epoch = jnp.floor_divide(step, steps_per_epoch) + 1
        if not steps:
            return value(epoch)
        warm = start + step / steps * (after(jnp.ceil(steps / steps_per_epoch)) - start)
        return jnp.where(step < steps, warm, value(epoch))

    return schedule


def make_schedule(
    options: OptimizerOptions, *, name: str, steps: int, steps_per_epoch: int, batch_size: int
) -> Schedule:
    """The learning rate as a function of the optimiser's own step count. name: its config key, for messages."""
    warmup = to_steps(
        options.warmup,
        name=f"{name}.warmup",
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        total=steps,
    )
    schedule = _schedule(options, name, warmup, steps, steps_per_epoch)
    if warmup > steps // 4:
        _warn_of_low_peak(options, name, schedule, steps)
    return schedule


def _warn_of_low_peak(options: OptimizerOptions, name: str, schedule: Schedule, steps: int) -> None:
    with jax.ensure_compile_time_eval():
        at = jnp.arange(0, steps, max(1, steps // 256))
        peak = float(jnp.max(jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(at)))
    if peak < options.lr / 2:
        logger.warning(
            "%s.warmup is %s of a run of %d steps: the learning rate never passes %.3g, where %s.lr is %g; use a "
            "shorter warm-up, such as '10%%'",
            *(name, options.warmup, steps, peak, name, options.lr),
        )


def _schedule(options: OptimizerOptions, name: str, warmup: int, steps: int, steps_per_epoch: int) -> Schedule:
    common = dict(
        steps_per_epoch=steps_per_epoch,
        decay_rate=options.decay_rate,
        warmup_steps=warmup,
        warmup_from=options.warmup_from,
    )
    if options.schedule == "epoch_cosine":
        return epoch_cosine(options.lr, epochs=-(-steps // steps_per_epoch), **common)
    if options.schedule == "released":
        del common["decay_rate"]
        return epoch_wave(options.lr, cosine_epochs=options.cosine_epochs or -(-steps // steps_per_epoch), **common)
    if options.schedule == "epoch_steps":
        return epoch_steps(options.lr, decay_epochs=options.decay_epochs, **common)
    if options.schedule == "epoch_factors":
        epochs, factors = tuple(options.decay_epochs), tuple(options.decay_factors)
        if len(epochs) != len(factors) or list(epochs) != sorted(epochs):
            raise UserError(
                f"{name}.decay_epochs is {epochs} and {name}.decay_factors {factors}; "
                "expected ascending epochs, and one factor for each"
            )
        del common["decay_rate"]
        return epoch_factors(options.lr, decay_epochs=epochs, decay_factors=factors, **common)
    if options.schedule == "constant":
        main = optax.constant_schedule(options.lr)
    else:
        main = optax.cosine_decay_schedule(options.lr, max(1, steps - warmup))
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(options.warmup_from, options.lr, warmup), main], [warmup])


def make_optimizer(
    options: OptimizerOptions, schedule: Schedule, finetune: FineTune | None = None
) -> optax.GradientTransformation:
    """The optimiser of these options.

    "sgd" and "adam" add the weight decay to the gradient of all parameters, like torch; "adamw" and "lars" decay
    matrices only; "torch_adamw" decays all parameters by lr * weight_decay * p, including norms, biases and tokens, as
    torch does by default. Adam corrects both means for their start at 0, then steps by lr * m / (sqrt(v) + eps).
    Parameters under a path of `constant_lr` have an optimiser of the same kind at the constant rate lr.

    finetune: what it says of the steps of layers and of the warm-up of the heads; None: nothing.
    """

    def make(schedule: Schedule) -> optax.GradientTransformation:
        tx = _one_optimizer(options, schedule)
        if not options.constant_lr:
            return tx
        constant = _one_optimizer(options, optax.constant_schedule(options.lr))
        return optax.partition({"scheduled": tx, "constant": constant}, lambda p: rate_labels(p, options.constant_lr))

    tx = finetune.optimizer(make, schedule) if finetune else make(schedule)
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), tx) if options.clip_norm else tx


def make_finetune(options: OptimizerOptions, model: Model, *, steps: int, **unit: int) -> FineTune:
    """How the main encoder is trained on, from the options of `optimizer`. steps: of the run. Raises UserError."""
    encoder, decay = model.encoder, options.layer_decay
    if decay and decay < 1 and not encoder.num_layers:
        raise UserError(f"optimizer.layer_decay is {decay}; expected 1: this encoder has no known layers")
    warmup = to_steps(options.head_warmup, name="optimizer.head_warmup", total=steps, **unit)
    if warmup >= steps:
        raise UserError(
            f"optimizer.head_warmup {options.head_warmup!r} is all of the run's {steps} updates; expected less, or "
            "optimizer.freeze=encoder"
        )
    decay = decay or (encoder.layer_decay if encoder.num_layers else 1.0)
    return FineTune(model, frozen_layer(options.freeze, encoder), decay, options.encoder_lr, warmup)


def rate_labels(params: Any, paths: Sequence[str]) -> Any:
    """Labels each parameter: "constant" at or under one of the paths (such as "heads/predictor"), else "scheduled"."""

    def label(path: tuple, _: Any) -> str:
        at = "/".join(str(getattr(p, "key", p)) for p in path)
        return "constant" if any(f"{at}/".startswith(f"{p}/") for p in paths) else "scheduled"

    return jax.tree_util.tree_map_with_path(label, params)


def _one_optimizer(options: OptimizerOptions, schedule: Schedule) -> optax.GradientTransformation:
    adam = dict(b1=options.betas[0], b2=options.betas[1], eps=options.eps)

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    if options.kind == "sgd":
        return optax.chain(
            optax.add_decayed_weights(options.weight_decay), optax.sgd(schedule, momentum=options.momentum)
        )
    if options.kind == "adam":
        return optax.chain(optax.add_decayed_weights(options.weight_decay), optax.adam(schedule, **adam))
    if options.kind in ("adamw", "torch_adamw"):
        mask = matrices if options.kind == "adamw" else None
        return optax.adamw(schedule, **adam, weight_decay=options.weight_decay, mask=mask)
    if options.clip_trust:
        return optax.chain(
            _clipped_trust(options, schedule), optax.trace(options.momentum), optax.scale_by_learning_rate(schedule)
        )
    return optax.lars(
        schedule,
        weight_decay=options.weight_decay,
        weight_decay_mask=matrices,
        trust_coefficient=options.trust_coefficient,
        trust_ratio_mask=matrices,
        momentum=options.momentum,
    )


def _clipped_trust(options: OptimizerOptions, schedule: Schedule) -> optax.GradientTransformation:
    """Decays matrices and scales their gradients by min(local rate / lr, 1); the rate itself is applied later.

    The local rate is trust_coefficient |p| / (|g| + weight_decay |p| + 1e-8). A matrix with |p| or |g| = 0 keeps its
    gradient. Source: LARC in NVIDIA's apex; in the same form in solo-learn's LARS.
    """
    decay = options.weight_decay

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(grads: Any, state: optax.ScaleByScheduleState, params: Any) -> tuple[Any, optax.ScaleByScheduleState]:
        lr = jnp.asarray(schedule(state.count), jnp.float32)

        def scaled(g: Array, p: Array) -> Array:
            if p.ndim < 2:
                return g
            size, slope = jnp.linalg.norm(p.ravel()), jnp.linalg.norm(g.ravel())
            local = options.trust_coefficient * size / (slope + decay * size + 1e-8)
            moves = (size > 0) & (slope > 0)
            return jnp.where(moves, jnp.minimum(local / lr, 1) * (g + decay * p), g)

        scaled_grads = jax.tree.map(scaled, grads, params)
        return scaled_grads, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
