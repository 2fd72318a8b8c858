"""The adversarial view of CLAE: images moved within epsilon so that the contrastive loss of the whole batch rises.

B batch, S image side, C channels.

Cost, in units of one encoder forward pass on B images (a backward pass to the images costs 1, a full one 2): the
anchor's forward pass 1, each of K steps 2. With K = 1, attack_view "same" and no random start, anchor and start are the
same images, which XLA encodes once: 2 in all. The view costs 3 in the main pass. A clean step on two views costs 6, so
CLAE costs at least 11/6 = 1.83 of it.

Source: Ho and Vasconcelos 2020, arXiv 2010.12050. Images are attacked as the network sees them, normalised. epsilon and
bounds are those of [0, 1] divided by the channel's deviation, so the sign of the gradient, and hence the attack, is the
same as on pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from jaxcl.adversarial import pgd
from jaxcl.errors import UserError
from jaxcl.method.stages.base import Stage, StageContext, StageOutput
from jaxcl.method.terms import Embedding
from jaxcl.method.terms.base import split_name
from jaxcl.method.views import View
from jaxcl.runtime.options import SHARE, OptionError, Range

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Adversary(Stage):
    """Adds a view of images perturbed to raise one term's loss on the batch."""

    anchor: str = "view1"  # the view that the adversarial one is contrasted with
    other: str = "view2"  # attack_view "other" starts from it
    # Perturb the anchor's own view (same, as the released code does) or the other one.
    attack_view: Literal["same", "other"] = "same"
    into: str = "adversarial"  # the new view
    term: str = "adversarial"  # the term on the new view whose loss is raised
    norm_set: str = "adv"  # batch norms of the attack's forward passes; "": the clean ones
    # Largest change of a value in [0, 1]: one for all channels, or one for each.
    epsilon: Annotated[Sequence[float], SHARE] = (0.015,)
    num_steps: Annotated[int, Range(1)] = 1  # 1: FGSM; more: PGD
    # Of a PGD step, as a multiple of epsilon; 0: 1 for one step, otherwise 2.5 / num_steps.
    step_size: Annotated[float, Range(0)] = 0.0
    random_start: bool = False  # start anywhere within epsilon
    clip: bool = True  # keep values in [0, 1] (the released code does not)
    commit_updates: bool = False  # let the attack's passes move running statistics (the released code does)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon:
            raise OptionError("epsilon", "is (); expected one value for all channels, or one each")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.anchor, self.of)))

    @property
    def of(self) -> str:
        """The view whose images are perturbed."""
        return self.anchor if self.attack_view == "same" else self.other

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.into,)

    def check(self, where: str, recipe: Any, num_devices: int) -> None:
        term = recipe.terms.get(self.term)
        if term is None:
            raise UserError(f"{where}.term is {self.term!r}, which the config lacks; name one of terms")
        if term.heads:
            raise UserError(
                f"{where} attacks terms.{self.term}, a loss of each image by itself; expected a loss of the batch, "
                "such as nt_xent or supcon"
            )
        if self.into not in term.reads:
            raise UserError(
                f"{where} attacks terms.{self.term}, which reads {', '.join(term.reads)}; "
                f"expected a term that reads the new view, {self.into}"
            )
        channels = recipe.image_shape[-1]
        if len(self.epsilon) not in (1, channels):
            raise UserError(f"{where}.epsilon has {len(self.epsilon)} values; expected one, or {channels}")
        recipe.model.check_norm_set(f"{where}.norm_set", self.norm_set)

    def __call__(self, context: StageContext, views: dict[str, View]) -> StageOutput:
        view = views[self.of]
        mean_C, std_C = jnp.asarray(context.mean), jnp.asarray(context.std)
        epsilon_C = jnp.asarray(self.epsilon) / std_C
        bounds = ((0 - mean_C) / std_C, (1 - mean_C) / std_C) if self.clip else None

        def embed(image: Array, stats, drawn: View) -> tuple[Embedding, dict]:
            mode = dict(train=True, norm_set=self.norm_set, where=drawn.where)
            h, stats = context.model.encode(context.params, stats, image, **mode)
            z, stats = context.model.embed(context.params, stats, h, aug_params=drawn.params, **mode)
            return Embedding(h, z, drawn.where), stats

        # The anchor is encoded by itself, so that its batch statistics are those of its own batch.
        anchor, stats = embed(views[self.anchor].image, context.batch_stats, views[self.anchor])
        fixed = {self.anchor: anchor}
        for name in context.reads(self.term):
            encoder, other = split_name(name)
            if name not in (self.anchor, self.into):
                fixed[name] = context.embed(encoder, views[other], "" if encoder else self.norm_set)

        def loss(image: Array) -> Array:
            return context.loss(self.term, {**fixed, self.into: embed(image, context.batch_stats, view)[0]})

        image = pgd(
            loss,
            view.image,
            epsilon=epsilon_C,
            step_size=epsilon_C * self.step_size if self.step_size else None,
            num_steps=self.num_steps,
            bounds=bounds,
            key=context.keys(f"{self.into}/start") if self.random_start else None,
        )
        if self.commit_updates:
            _, stats = embed(view.image, stats, view)
        return StageOutput({self.into: View(image, view.params, view.where)}, stats if self.commit_updates else None)
