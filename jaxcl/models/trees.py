"""Where the parameters and batch statistics of a model, and of several models, lie in their trees.

params                                     batch statistics
encoder/...                                ... (those of the encoder, at the top)
lora/... (factors, a tree like encoder/)
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
LORA = "lora"  # low-rank factors of the encoder's kernels
# Beside the main model: other models, the heads that terms read, and EMA encoders, which memory holds.
ENCODERS, HEADS, TARGETS = "encoders", "heads", "targets"


def branch_name(stage: int) -> str:
    """The name of the branch that leaves the encoder after a stage (from 1)."""
    return f"stage{stage}"


def encoder_stats(stats: Tree) -> Tree:
    """The batch statistics of a model's encoder, from a tree that also holds its heads' and adapters'."""
    return {k: v for k, v in stats.items() if k not in (HEAD, BRANCHES)}


def with_head(stats: Tree, own: Tree) -> Tree:
    """A model's batch statistics with new ones for its head; without any, nothing is added."""
    return {**stats, HEAD: own} if own else stats


def with_branch(stats: Tree, name: str, key: str, own: Tree) -> Tree:
    """A model's batch statistics with new ones for the ADAPTER or HEAD (`key`) of a branch."""
    if not own:
        return stats
    branches = stats.get(BRANCHES, {})
    return {**stats, BRANCHES: {**branches, name: {**branches.get(name, {}), key: own}}}
