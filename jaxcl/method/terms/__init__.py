"""Terms: losses on the named embeddings of one update. The equations are in jaxcl.losses; terms give them their inputs.

Belongs here: which embeddings, labels, negatives and weights a loss takes. Does not: equations, encoders, the update.
The built-in terms are named in jaxcl/method/registry.py.
"""

from jaxcl.method.terms.base import Embedding, PairTerm, Term

__all__ = ["Embedding", "PairTerm", "Term"]
