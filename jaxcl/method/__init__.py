"""What a method is made of, and the one update that runs it.

Belongs here: the five slots (views, stages, passes, terms, memory), the recipe that a config becomes, its optimisers,
and how the update runs them on a mesh. Does not: equations (jaxcl.losses), networks (jaxcl.models), the loop over steps
(jaxcl.train). No part knows which paper uses it: a paper is a config.

To add a part of your own, subclass `Term`, `Stage`, `MemoryPart` or `Head` and name it in a config by
`kind="package.module:Name"`.
"""

from jaxcl.method.heads import Head, HeadInput
from jaxcl.method.memory import InitContext, MemoryPart, StepOutput
from jaxcl.method.stages.base import Stage, StageContext, StageOutput
from jaxcl.method.terms.base import Embedding, PairTerm, Term
from jaxcl.method.views import View

__all__ = [
    "Embedding",
    "Head",
    "HeadInput",
    "InitContext",
    "MemoryPart",
    "PairTerm",
    "Stage",
    "StageContext",
    "StageOutput",
    "StepOutput",
    "Term",
    "View",
]
