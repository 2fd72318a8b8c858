"""The saliency-masked view of ExCon: keep the pixels that explain the class; failed masks become backgrounds.

B batch, S image side, h w M a feature map, K room for backgrounds.

Cost, in units of one encoder forward pass on B images (a full backward pass costs 2), with t the share of the network
behind the tap: the explainer's forward pass 1 and its backward pass to the tap t, the acceptance test 1; each
background row 3 in the main pass. SupCon's step costs 6, so ExCon costs at least (8 + t)/6 <= 1.5 of it, and ExConB
with room for B backgrounds (11 + t)/6 <= 2.0. A background is encoded once, though it counts twice in each denominator.

Source: Zhang et al. 2021, arXiv 2111.14271, in the form of the released code.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxcl import saliency
from jaxcl.augment import IDENTITY
from jaxcl.errors import UserError
from jaxcl.method.stages.base import Stage, StageContext, StageOutput
from jaxcl.method.views import View
from jaxcl.runtime.options import SHARE, Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SaliencyMask(Stage):
    """Replaces a view by the masked image wherever the classifier still predicts the image's class."""

    of: str = "standard"  # the view that is explained and masked
    into: str = "view1"  # the view that accepted masks replace
    rejected: str = ""  # the new view of rejected masked images, as padded rows; "": none (ExCon)
    classifier: str = "probe"  # the memory part that classifies features
    method: Literal["grad_cam", "input_gradient", "integrated_gradients"] = "grad_cam"
    tap: str = "stage2"  # grad_cam: the stage whose last convolution is explained
    relu: bool = False  # grad_cam: ReLU after the channel sum (the released code has none)
    threshold: Annotated[float, SHARE] = 0.5  # a pixel is kept above this value of the map, in [0, 1]
    # Explain the true class (label) or the predicted one.
    target: Literal["label", "predicted"] = "label"
    bn: Literal["batch", "running"] = "batch"  # batch norm statistics while explaining and testing
    commit_updates: bool = False  # let those forward passes move the running statistics (the released code does)
    background_capacity: Annotated[float, Range(above=0, at_most=1)] = (
        1.0  # Room for rejected rows as a share of the batch; further rows are dropped.
    )
    augment: bool = False  # apply the replaced view's augmentations to the accepted masked image

    @property
    def reads(self) -> tuple[str, ...]:
        return self.of, self.into

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into, self.rejected) if self.rejected else (self.into,)

    def check(self, where: str, recipe: Any, num_devices: int) -> None:
        part = recipe.memory.get(self.classifier)
        if part is None:
            raise UserError(f"{where} needs memory.{self.classifier} (a linear_probe), which the config lacks")
        if part.schedule == "sequential":
            raise UserError(
                f"{where} explains with memory.{self.classifier}, which schedule 'sequential' trains only after "
                "the encoder; use 'online' or 'alternating'"
            )
        if self.method == "grad_cam":
            recipe.model.check_tap(self.tap)
        rows = self.capacity(recipe.batch_size)
        if rows % num_devices:
            raise UserError(
                f"{where}.background_capacity gives {rows} rows, which do not divide over {num_devices} devices"
            )
        recipe.grad_cache.check_rows(f"{where}.background_capacity", rows, recipe.batch_size, num_devices)

    def capacity(self, batch_size: int) -> int:
        """Rows of the background view."""
        return max(1, round(self.background_capacity * batch_size))

    def __call__(self, context: StageContext, views: dict[str, View]) -> StageOutput:
        image, backup = views[self.of].image, views[self.into]
        maps, stats = self._explain(context, image)
        maps = saliency.normalize_map(maps, image.shape[1])
        keep = saliency.keep_mask(maps, self.threshold)
        masked = saliency.apply_mask(image, keep)  # 0 in normalised space: the mean colour

        train = self.bn == "batch"
        h, stats = context.model.encode(context.params, stats, masked, train=train)
        accepted = context.classifier(context.memory, h).argmax(-1) == context.label

        replacement = View(masked, views[self.of].params)
        if self.augment:
            # Pipelines take pixels in [0, 1]: kept pixels come from the raw image, the others have the mean colour.
            replacement = context.augment(self.into, f"{self.into}/masked", self._masked_pixels(context, keep))
        out = {
            self.into: View(
                jnp.where(accepted[:, None, None, None], replacement.image, backup.image),
                _drawn(accepted, replacement.params, backup.params),
                backup.where,
            )
        }
        metrics = {
            "saliency/accepted": accepted.mean(),
            "saliency/kept_area": keep.mean(),
        }
        if self.rejected:
            out[self.rejected], dropped = self._backgrounds(masked, ~accepted)
            metrics["saliency/backgrounds"] = (~accepted).sum() - dropped
            metrics["saliency/backgrounds_dropped"] = dropped
        return StageOutput(out, stats if self.commit_updates and train else None, metrics)

    def _masked_pixels(self, context: StageContext, keep: Array) -> Array:
        if keep.shape[1:] != context.pixels.shape[1:3]:
            raise UserError("stage saliency: augment=True needs views of the images' own size")
        return jnp.where(keep[..., None], context.pixels, jnp.asarray(context.mean))

    def _explain(self, context: StageContext, image: Array) -> tuple[Array, dict]:
        """-> (maps [B,h,w] or [B,S,S], batch statistics after the explaining forward)."""
        model, params, train = context.model, context.params, self.bn == "batch"
        if self.method == "grad_cam":
            activations, tail, stats = model.split_at(params, context.batch_stats, image, self.tap, train=train)

            def tail_logits(a: Array) -> Array:
                return context.classifier(context.memory, tail(a)[0])

            if self.target == "label":
                target = context.label
            else:
                target = tail_logits(activations).argmax(-1)
            if self.commit_updates and train:
                stats = tail(activations)[1]
            return saliency.grad_cam(tail_logits, activations, target, relu=self.relu), stats

        def logits(x: Array) -> Array:
            h, _ = model.encode(params, context.batch_stats, x, train=train)
            return context.classifier(context.memory, h)

        target = context.label if self.target == "label" else logits(image).argmax(-1)
        explain = saliency.input_gradient if self.method == "input_gradient" else saliency.integrated_gradients
        stats = context.batch_stats
        if self.commit_updates and train:
            stats = model.encode(params, stats, image, train=True)[1]
        return explain(logits, image, target), stats

    def _backgrounds(self, masked: Array, rejected: Array) -> tuple[View, Array]:
        """-> (rejected images as padded rows, in order; the number of images without room)."""
        B, K = masked.shape[0], self.capacity(masked.shape[0])
        if K == B:
            # Padded in place, without a gather: images of a sharded batch stay on their devices.
            return View(masked, {}, rejected), jnp.zeros((), jnp.int32)
        order = jnp.argsort(~rejected, stable=True)[:K]
        count = rejected.sum()
        return View(masked[order], {}, jnp.arange(K) < count), jnp.maximum(count - K, 0)


def _drawn(accepted: Array, params: dict[str, Array], backup: dict[str, Array]) -> dict[str, Array]:
    """The augmentation parameters of a view whose accepted rows were replaced, for heads conditioned on them."""

    def chosen(name: str, old: Array) -> Array:
        if name not in params and name not in IDENTITY:  # no head is conditioned on it
            return old
        new = params[name] if name in params else jnp.asarray(IDENTITY[name], old.dtype).reshape(old.shape[1:])
        return jnp.where(accepted.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return {name: chosen(name, old) for name, old in backup.items()}
