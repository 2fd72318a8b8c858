"""Where the parameters and batch statistics of a model, and of several models, lie in their trees.

params                                     batch statistics
encoder/...                                ... (those of the encoder, at the top)
head/...                                   head/...
branches/stageK/{adapter,head}/...         branches/stageK/{adapter,head}/...
encoders/NAME/ (a tree like this one)      encoders/NAME/
heads/NAME/...                             heads/NAME/...
targets/NAME/ (only within an update)      targets/NAME/
"""

from typing import Any

Tree = Any

# Of one model.
ENCODER, HEAD, BRANCHES = "encoder", "head", "branches"
ADAPTER = "adapter"  # in a branch, beside its HEAD
# Beside the main model: other models, the heads that terms read, and EMA encoders, which memory holds.
ENCODERS, HEADS, TARGETS = "encoders", "heads", "targets"


def branch_name(stage: int) -> str:
    """The name of the branch that leaves the encoder after a stage (from 1)."""
    return f"stage{stage}"


def encoder_stats(stats: Tree) -> Tree:
    """The batch statistics of a model's encoder, without those of its heads and adapters."""
    return {k: v for k, v in stats.items() if k not in (HEAD, BRANCHES)}


def with_head(stats: Tree, own: Tree) -> Tree:
    """Batch statistics of a model with those of its head replaced; without any, the key is absent."""
    return {**stats, HEAD: own} if own else stats


def with_branch(stats: Tree, name: str, key: str, own: Tree) -> Tree:
    """Batch statistics of a model with those of a branch's ADAPTER or HEAD replaced."""
    if not own:
        return stats
    branches = stats.get(BRANCHES, {})
    return {**stats, BRANCHES: {**branches, name: {**branches.get(name, {}), key: own}}}
