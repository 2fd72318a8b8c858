"""Configs compared by what is learned: free keys make no difference, all others do."""

import tiny

from jaxcl import config as base
from jaxcl.train import config_diff


def test_only_keys_that_decide_what_is_learned_differ():
    old, new = base.to_dict(tiny.config()), base.to_dict(tiny.config())
    new["log_every"], new["devices"], new["eval"]["knn_k"], new["data"]["prefetch"] = "7 steps", 3, 5, 9
    assert config_diff.differences(old, new) == [] and config_diff.fingerprint(old) == config_diff.fingerprint(new)
    new["stages"][0]["tap"] = "stage1"
    assert config_diff.differences(old, new) == ["stages[0].tap: 'stage2' -> 'stage1'"]
    assert config_diff.fingerprint(old) != config_diff.fingerprint(new)


def test_free_keys_are_keys_of_a_config():
    keys = config_diff.flatten(base.to_dict(base.default()))
    assert [f for f in config_diff.FREE_KEYS if not any(k == f or k.startswith(f"{f}.") for k in keys)] == []
