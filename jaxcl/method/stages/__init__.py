"""Stages: views made from views before encoding, under stop-gradient, such as a saliency mask or an adversary.

Belongs here: how a stage uses the running encoder, classifier and terms. Does not: the pure image functions, which are
in jaxcl.augment, jaxcl.saliency and jaxcl.adversarial. The built-in stages are named in jaxcl/method/registry.py.
"""

from jaxcl.method.stages.base import Stage, StageContext, StageOutput

__all__ = ["Stage", "StageContext", "StageOutput"]
