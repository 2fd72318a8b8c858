"""Two configs compared: whether a run may be continued under another one, and the key in which they differ."""

import hashlib
import json
from typing import Any

# Keys that may differ between a run and its continuation: they do not change what is learned.
FREE_KEYS = (
    "log_every",
    "collapse_every",
    "log_examples",
    "checkpoint",
    "report",
    "wandb",
    "eval",
    "devices",
    "hosts",
    "sharding",
    "data.prefetch",
    "data.tfds.data_dir",
    "data.files.max_pixels",  # which files are left out for it shows in the data itself
)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Compare two configs by the keys that decide what is learned.

    Args:
      old, new: from `jaxcl.config.to_dict`.

    Returns:
      The keys that differ, sorted, each as "key: old -> new"; weights come first, since they decide other keys.
    """
    a, b = _learned(old), _learned(new)
    keys = sorted(a.keys() | b.keys(), key=lambda k: (not k.endswith(".weights"), k.startswith("pretrained"), k))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def fingerprint(config: dict[str, Any]) -> str:
    """A short hash of the keys that decide what is learned: equal for a run and its continuation."""
    return hashlib.sha256(json.dumps(_learned(config), sort_keys=True).encode()).hexdigest()[:12]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config: {"model.depth": 18, "stages[0].tap": "stage2", ...}."""
    if isinstance(tree, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items()]
    elif isinstance(tree, list) and any(isinstance(v, dict) for v in tree):
        items = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, key).items()}


def _learned(config: dict[str, Any]) -> dict[str, Any]:
    """The flattened config without FREE_KEYS."""

    def free(key: str) -> bool:
        return any(key == f or key.startswith((f"{f}.", f"{f}[")) for f in FREE_KEYS)

    return {k: v for k, v in flatten(config).items() if not free(k)}
