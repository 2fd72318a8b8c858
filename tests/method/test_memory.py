"""Memory parts by themselves: the probe's step written out, and rows that do not exist, which teach nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxcl.method.memory import InitContext, LinearProbe, Queue, StepOutput, enqueue
from jaxcl.method.terms import Embedding

RATE, CLASSES = 0.3, 4
LABEL = np.array([0, 1, 2, 3, 1, -1], np.int32)
H1, H2 = tiny.normal(6, 5), tiny.normal(6, 5, seed=1)


def output(embeddings, **changes):
    """A StepOutput whose representation is the main encoder's."""
    fields = dict(encoder=None, progress=jnp.float32(0), label=jnp.asarray(LABEL), tx=optax.sgd(RATE)) | changes
    return StepOutput(represented=embeddings.__getitem__, embeddings=embeddings, **fields)


def probe(**options):
    part, tx = LinearProbe(**options), optax.sgd(RATE)
    memory = part.init(jax.random.key(0), InitContext(5, CLASSES, None, None, tx))
    memory["params"] = tiny.fill(memory["params"])
    return part, memory


def step(params, h, labels):
    """Softmax regression by hand -> (new kernel, new bias, loss, accuracy), of the rows with a label."""
    h, labels = h[labels >= 0].astype(np.float64), labels[labels >= 0]
    kernel, bias = (np.asarray(params["dense"][k], np.float64) for k in ("kernel", "bias"))
    logits = h @ kernel + bias
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (share - np.eye(CLASSES)[labels]) / len(labels)
    loss = -np.log(share[np.arange(len(labels)), labels]).mean()
    return kernel - RATE * h.T @ error, bias - RATE * error.sum(0), loss, (logits.argmax(1) == labels).mean()


EXISTS = np.array([True, False, True, True, False, True])


@pytest.mark.parametrize("where", [None, EXISTS], ids=["all rows", "some rows"])
def test_the_probe_learns_from_rows_that_exist(where):
    """Of two views, one with rubbish in rows that do not exist; unlabelled rows do not count either; cases F."""
    h2, exists = H2.copy(), np.ones(6, bool) if where is None else where
    h2[~exists] = 1e3
    part, memory = probe(views=("view1", "view2"))
    views = {"view1": Embedding(H1, None), "view2": Embedding(h2, None, where)}
    new, metrics = part.after(memory, output(views))
    labels = np.concatenate([LABEL, np.where(exists, LABEL, -1)])
    kernel, bias, loss, accuracy = step(memory["params"], np.concatenate([H1, h2]), labels)
    np.testing.assert_allclose(new["params"]["dense"]["kernel"], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new["params"]["dense"]["bias"], bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["probe/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["probe/accuracy"], accuracy, rtol=1e-6)


def test_a_probe_of_its_own_phase_leaves_out_the_same_rows():
    """cases F."""
    part, memory = probe(schedule="alternating")
    h = H1.copy()
    h[~EXISTS] = -1e3
    new, _ = part.learn(memory, [Embedding(h, None, EXISTS)], LABEL, optax.sgd(RATE))
    kernel, *_ = step(memory["params"], h, np.where(EXISTS, LABEL, -1))
    np.testing.assert_allclose(new["params"]["dense"]["kernel"], kernel, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pointer", [0, 4, 6])
@pytest.mark.parametrize("exists", [EXISTS, np.zeros(6, bool), np.ones(6, bool)])
def test_rows_that_do_not_exist_take_no_place_in_a_queue(pointer, exists):
    """As if they had not been in the batch; slots wrap around; cases F."""
    part = Queue(of="view1", length=7)
    memory = {"columns": jnp.asarray(tiny.normal(5, 7, seed=3)), "pointer": jnp.int32(pointer)}
    z = H1.copy()
    z[~exists] = 1e3
    new, _ = jax.jit(lambda m, z, w: part.after(m, output({"view1": Embedding(None, z, w)})))(memory, z, exists)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    want, at = np.array(memory["columns"]), pointer
    for row in unit[exists]:
        want[:, at % 7] = row
        at += 1
    np.testing.assert_allclose(new["columns"], want, rtol=1e-5, atol=1e-6)
    assert new["pointer"] == at % 7 and new["pointer"].dtype == jnp.int32
    if exists.all():
        plain = enqueue(memory, jnp.asarray(unit))
        np.testing.assert_allclose(plain["columns"], want, rtol=1e-5, atol=1e-6)
