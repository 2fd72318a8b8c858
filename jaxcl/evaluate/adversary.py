"""The adversary of training: how far its attack moves the images of a batch towards each other.

B images of a batch, S side, C channels, D features of an embedding.
"""

import jax
import numpy as np

from jaxcl.augment import denormalize
from jaxcl.evaluate.base import Evaluator, Metrics, NotApplicable, Panels
from jaxcl.evaluate.context import EvalContext
from jaxcl.losses.common import inner, unit
from jaxcl.method import sharding
from jaxcl.method.inputs import make_views, run_stages
from jaxcl.method.recipe import Phase
from jaxcl.method.stages.adversary import Adversary
from jaxcl.method.state import TrainState

Array = jax.Array
SHOWN = 8  # images in the panel


class AdversaryMoves(Evaluator):
    """The adversary stage, on the first batch of training images.

    Similarities are cosines of embeddings as the attack computes them: in training mode, with the adversary's own
    batch norms. They compare an image, clean and adversarial, with the clean views of all images.

    Metrics: "positive_before" and "positive_after" the attack, mean similarity to the image's own view;
    "hardest_negative_before" and "..._after", the largest similarity to another image; "hardest_negative_changed",
    share of the images whose hardest negative is another one after the attack.
    """

    def __call__(self, context: EvalContext) -> tuple[Metrics, Panels]:
        recipe, model, mesh, train = context.recipe, context.recipe.model, context.mesh, context.setup.training
        stage = next((s for s in recipe.stages if isinstance(s, Adversary)), None)
        if stage is None:
            raise NotApplicable("the config has no adversary stage")
        last = Phase("encoder", tuple(range(len(recipe.stages))))
        names = recipe.view_names(last)

        def attack(state: TrainState, batch: dict[str, Array]) -> dict[str, Array]:
            views, _, _ = run_stages(recipe, last, state, batch, make_views(recipe, state, batch, names), mesh)

            def embed(image: Array) -> Array:
                mode = dict(train=True, norm_set=stage.norm_set)
                h, _ = model.encode(state.params, state.batch_stats, image, **mode)
                return unit(model.embed(state.params, state.batch_stats, h, **mode)[0])

            clean, moved = views[stage.of].image, views[stage.into].image
            anchor_BxD, clean_BxD, moved_BxD = embed(views[stage.anchor].image), embed(clean), embed(moved)
            return {
                "clean": denormalize(clean, recipe.mean, recipe.std),
                "adversarial": denormalize(moved, recipe.mean, recipe.std),
                "perturbation": (moved - clean) * np.asarray(recipe.std, clean.dtype),
                "before": inner(clean_BxD, anchor_BxD),
                "after": inner(moved_BxD, anchor_BxD),
            }

        count = min(len(train), recipe.batch_size) // mesh.size * mesh.size
        batch = train.batch(np.arange(count))
        # Replicated outputs: the host reads them.
        jitted = context.setup.compiled("adversary", lambda: jax.jit(attack, out_shardings=sharding.replicated(mesh)))
        out = jax.device_get(jitted(context.state, sharding.device_put(batch, sharding.batch_sharding(mesh))))

        not_itself = np.where(np.eye(count, dtype=bool), -np.inf, 0)
        before, after = out["before"] + not_itself, out["after"] + not_itself
        partner = (out["after"] - out["before"] + not_itself).argmax(-1)  # the image it moved towards the most
        rows = np.arange(count)
        metrics = {
            "positive_before": float(np.diag(out["before"]).mean()),
            "positive_after": float(np.diag(out["after"]).mean()),
            "hardest_negative_before": float(before.max(-1).mean()),
            "hardest_negative_after": float(after.max(-1).mean()),
            "hardest_negative_changed": float((before.argmax(-1) != after.argmax(-1)).mean()),
        }
        shown = np.argsort(before[rows, partner] - after[rows, partner], kind="stable")[:SHOWN]  # the largest gains
        panel = {k: out[k][shown] for k in ("clean", "perturbation", "adversarial")}
        panel |= {
            "partner": out["clean"][partner[shown]],
            "before": before[shown, partner[shown]],
            "after": after[shown, partner[shown]],
        }
        label = np.asarray(batch["label"])
        named = lambda i: train.class_names[label[i]] if label[i] >= 0 else ""  # noqa: E731
        panel["names"] = [named(i) for i in shown]
        panel["partner_names"] = [named(i) for i in partner[shown]]
        return metrics, {"adversary": panel}
