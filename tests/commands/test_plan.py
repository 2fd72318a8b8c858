"""The plan's numbers against programs that are compiled, and what it says of runs that cannot be."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiled_updates import config, program
from processes import ROOT

from jaxcl.commands.plan import counts as plan_counts
from jaxcl.commands.plan import figure, text
from jaxcl.commands.plan.chips import CHIPS
from jaxcl.commands.plan.collectives import collectives, totals
from jaxcl.commands.plan.main import main as plan_command
from jaxcl.commands.plan.program_costs import cost
from jaxcl.errors import UserError
from jaxcl.method import sharding

FACTS = dict(
    num_examples=1024, image_shape=(16, 16, 3), mean=tiny.MEAN, std=tiny.STD, num_classes=tiny.CLASSES, labelled=True
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 64)  # otherwise nothing of the tiny network would be sharded


@pytest.fixture(scope="module")
def plan():
    c = config(batch_size=tiny.BATCH)
    return plan_counts.make_plan(c, FACTS, devices=8, kind="v5e", hosts=1, most=8)


def test_what_is_sent_is_what_a_compiled_step_sends(plan):
    """Data parallel over eight devices: within a tenth, scalars and figures apart."""
    (row,) = (r for r in plan["table"] if r["devices"] == 8)
    counted = sum(totals(collectives(program("supcon", "data", "8")[3].as_text())).values())
    assert sum(row["sent"].values()) == pytest.approx(counted, rel=0.1)
    assert row["sent"]["parameters"] == 0 and row["sent"]["gradients"] > row["sent"]["norms"] > 0


def test_what_is_held_is_what_a_compiled_step_holds(plan):
    """State and batch to the byte, near enough; the rest within a factor of XLA's account, which fuses otherwise."""
    stats = program("supcon", "data", "8")[3].memory_analysis()
    held = sum(plan["memory"][k] for k in ("params", "opt_state", "memory", "batch_stats", "batch"))
    assert held == pytest.approx(stats.argument_size_in_bytes, rel=0.02)
    assert 0.4 < plan["memory"]["activations and gradients"] / stats.temp_size_in_bytes < 2.5
    assert plan["fits"] and plan["memory_of_chip"] == CHIPS["v5e"].memory


def test_one_device_sends_nothing(plan):
    first = plan["table"][0]
    assert first["devices"] == 1 and not any(first["sent"].values()) and first["loss"] == "whole"
    assert [r["batch"] for r in plan["table"]] == [2, 4, 8, 16]
    assert plan["ring_from"] is None


def test_the_ring_is_seen(monkeypatch):
    """With less room for logits, the larger numbers of devices go round."""
    from jaxcl.losses import limits

    with limits(dense_logits=40, tile=8):
        plan = plan_counts.make_plan(config(batch_size=16), FACTS, devices=8, kind="H100", most=8)
    assert [r["loss"] for r in plan["table"]] == ["whole", "gathered", "ring", "ring"]
    assert plan["ring_from"] == 4
    shown = text.as_text(plan)
    assert "a ring from 4 devices on" in shown and "Assumed:" in shown and "Counted:" in shown


def test_what_does_not_fit_is_said(plan, tmp_path):
    assert "DOES NOT FIT" not in text.as_text(plan)
    large = plan | {"fits": False, "memory_needed": 20e9}
    assert "THIS DOES NOT FIT: a device needs 18.6 GiB, a v5e has 14.9 GiB." in text.as_text(large)
    figure.draw(plan, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_costs_of_small_programs():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
    assert cost(jax.make_jaxpr(jnp.dot)(x, w)).flops == 2 * 8 * 16 * 32
    looped = jax.make_jaxpr(lambda x, w: jax.lax.scan(lambda c, _: (c, c @ w), x, None, length=5))(x, w)
    assert cost(looped).flops == 5 * 2 * 8 * 16 * 32

    def two(x, w):
        return jnp.sum(jax.nn.relu(x @ w) @ w.T)

    # When most is held: the first product, what the relu makes of it for the second one, and that.
    got = cost(jax.make_jaxpr(two)(x, w))
    assert got.flops == 4 * 8 * 16 * 32
    assert got.temporaries == 4 * (2 * 8 * 32 + 8 * 16)
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    conv = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    assert cost(conv(image, kernel)).flops == 2 * 2 * 8 * 8 * 4 * 27


@pytest.mark.slow
def test_work_is_three_forward_passes():
    """Forward, and backward to the kernels and to the images; but the first layer's images want no gradient."""
    from jaxcl.models import ResNetOptions, make_model

    model = make_model(ResNetOptions(depth=50, stem="imagenet"))
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (224, 224, 3)))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

    def forward(params, stats, x):
        return model.encode(params, stats, x, train=True)[0].sum()

    one = cost(jax.make_jaxpr(forward)(params, stats, images)).flops
    assert one / 2 == pytest.approx(2 * 4.09e9, rel=0.02)  # 4.09 G products and sums, as is published for ResNet-50
    assert cost(jax.make_jaxpr(jax.grad(forward))(params, stats, images)).flops == pytest.approx(3 * one, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), ("--kind=H100", "--config.sharding=fsdp", "--hosts=4")])
def test_the_command(tmp_path, extra):
    command = [sys.executable, "-m", "jaxcl", "plan", "--config=configs/simclr.py:imagenet", "--devices=256"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--kind=v5p", f"--out={tmp_path}", *extra], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "256 x" in done.stdout and "1024" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "weak_scaling.png"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--devices=8"], "--config"),
        (["--config=configs/simclr.py"], "--devices"),
        (["--config=configs/simclr.py", "--devices=8", "--kind=v9"], "--kind.*v9.*v4, v5e"),
        (["--config=configs/simclr.py", "--device=8"], "--device; .*'devices'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        plan_command(["plan", *arguments])


def test_the_shares_of_a_split_state():
    c = config(sharding="fsdp", batch_size=16)
    plan = plan_counts.make_plan(c, FACTS, devices=8, kind="v5p", hosts=1, most=8)
    whole = sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(lambda: tiny_params(c))))
    assert plan["memory"]["params"] < 0.3 * whole
    (row,) = (r for r in plan["table"] if r["devices"] == 8)
    assert row["sent"]["parameters"] > 0


def tiny_params(c):
    return tiny.recipe(c, num_devices=8).model.init(jax.random.key(0), (16, 16, 3))[0]
