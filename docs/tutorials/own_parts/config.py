"""A method made of parts of one's own: `python -m jaxcl train --config=config.py`, in this folder."""

from jaxcl import config as base


def get_config(preset: str = ""):
    """The config; it has no presets."""
    c = base.default()
    c.name = "own parts"
    c.batch_size, c.duration = 64, "4 epochs"
    c.data.source = "my_parts.sources:Shapes:600"
    c.data.options = dict(side=16)

    c.model = base.model("my_parts.encoders:PlainOptions", width=32, head_features=16)
    for name in ("view1", "view2"):
        c.views[name] = base.view("random", crop_area=(0.5, 1.0))
    c.stages = (base.stage("my_parts.stages:Erase", of="view1", share=0.3),)
    c.passes = (base.encode("view1", "view2"),)
    c.terms.align = base.term("my_parts.terms:AlignUniform", views=("view1", "view2"), temperature=2.0)
    c.memory.probe = base.memory("linear_probe", views=("view2",), optimizer=dict(lr=0.1, weight_decay=0.0))
    c.optimizer = base.options(base.OptimizerOptions, kind="adam", lr=3e-3, weight_decay=0.0, schedule="constant")

    c.eval.every = "0"
    c.eval.final = ("knn", "linear", "classifier", "my_parts.evaluators:Silhouette")
    c.checkpoint.every = "10 steps"
    return c
