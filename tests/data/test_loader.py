"""Loader: the same batches for any number of processes, starting step and kind of source."""

import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from numbered_sources import OnDisk, mesh_sharding, numbered

from jaxcl.data import Loader, batches, shuffle
from jaxcl.data.shuffle import Shuffled
from jaxcl.errors import UserError

ORDERS = [[8, 7, 0, 1, 9], [1, 7, 11, 3, 10], [11, 5, 7, 3, 9]]


def take(source, count, **options):
    with Loader(source, **{"batch_size": 8, "seed": 0, **options}) as loader:
        return [next(loader) for _ in range(count)]


def ids(taken):
    return [b["index"].tolist() for b in taken]


@pytest.mark.parametrize("make", [numbered, OnDisk])
def test_an_epoch_is_a_shuffled_pass_without_its_last_partial_batch(make):
    steps = 35 // 8
    taken = ids(take(make(35), 3 * steps))
    epochs = [sum(taken[e * steps : (e + 1) * steps], []) for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 32  # no example twice, so no batch holds two epochs
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != epochs[2]
    assert len(set(epochs[0]) | set(epochs[1]) | set(epochs[2])) > 32  # other examples are dropped each time


def test_rows_belong_together():
    for batch in take(numbered(50), 6):
        assert (batch["image"][:, 0, 0, 0] == batch["index"]).all()
        assert (batch["label"] == batch["index"] % 7).all()
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == batch["index"].dtype == np.int32


@pytest.mark.parametrize("make", [numbered, OnDisk])
@pytest.mark.parametrize("step", [1, 4, 5, 1_000_003])
def test_starting_later_gives_the_batches_of_that_step(make, step):
    if step > 100:  # compares loaders that start there and one step earlier
        assert ids(take(make(35), 3, start_step=step))[1:] == ids(take(make(35), 2, start_step=step + 1))
    else:
        assert ids(take(make(35), step + 3))[step:] == ids(take(make(35), 3, start_step=step))


def test_seeds_differ_and_repeat():
    first, again, other = (ids(take(numbered(64), 5, seed=s)) for s in (0, 0, 1))
    assert first == again != other
    # A neighbouring seed must not be the same run one epoch later.
    assert ids(take(numbered(64), 16, seed=0))[8:] != ids(take(numbered(64), 8, seed=1))


def test_any_seed_will_do_and_is_taken_modulo_2_to_the_64():
    assert ids(take(numbered(64), 3, seed=-1)) == ids(take(numbered(64), 3, seed=2**64 - 1))
    assert ids(take(numbered(64), 3, seed=2**64 + 7)) == ids(take(numbered(64), 3, seed=7))


def test_any_step_of_the_order_is_found_directly():
    order = Shuffled(35, batch_size=8, seed=3)
    walked = ids(take(numbered(35), 9, batch_size=8, seed=3))
    assert [order(k).tolist() for k in reversed(range(9))] == walked[::-1]
    far = ids(take(numbered(35), 1, batch_size=8, seed=3, start_step=10**9, process_index=1, process_count=4))
    assert far == [order(10**9)[2:4].tolist()]


def test_the_order_stays_what_it_is():
    """A run resumes with the order it began with: if these numbers change, `shuffle.ORDER` must change."""
    assert shuffle.ORDER == "hash-1"
    assert Shuffled(12, batch_size=5, seed=0)(0).tolist() == ORDERS[0]
    assert Shuffled(12, batch_size=5, seed=0)(3).tolist() == ORDERS[1]
    assert Shuffled(12, batch_size=5, seed=-5)(10**9).tolist() == ORDERS[2]


# 2^2k + 1 is there because grain's shuffle repeats a row in sets of that size.
@pytest.mark.parametrize("count", [1, 2, 17, 65, 256, 257, 1_000, 65_537])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_an_epoch_has_every_row_once(count, seed):
    order = Shuffled(count, batch_size=1, seed=seed)
    epochs = [np.concatenate([order(count * e + k) for k in range(count)]) for e in range(2)]
    assert all((np.sort(rows) == np.arange(count)).all() for rows in epochs)
    assert count < 17 or (epochs[0] != epochs[1]).any()


def test_neighbouring_seeds_and_epochs_are_unrelated():
    orders = [Shuffled(2_000, batch_size=2_000, seed=seed)(epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 10  # 1 in expectation
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.1


@pytest.mark.parametrize("make", [numbered, OnDisk])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_every_global_batch(make, count):
    whole = ids(take(make(35), 9))
    parts = [ids(take(make(35), 9, process_index=p, process_count=count)) for p in range(count)]
    for k, batch in enumerate(whole):
        shares = [part[k] for part in parts]
        assert all(len(share) == 8 // count for share in shares)
        assert sum(shares, []) == list(batch)  # row by row
    # A run may continue with another number of processes.
    later = [ids(take(make(35), 2, start_step=7, process_index=p, process_count=count)) for p in range(count)]
    assert [part[7:] for part in parts] == later


def test_memory_and_disk_give_the_same_order_and_disk_reads_in_parallel():
    disk = OnDisk(40, delay=0.002)
    for a, b in zip(take(numbered(40), 12), take(disk, 12), strict=True):
        assert all((a[k] == b[k]).all() for k in a)
    assert len(disk.threads) > 1


def test_batches_arrive_sharded_and_pass_the_transfer_guard():
    expected = take(numbered(35), 3)
    update = jax.jit(lambda batch: batch["label"].sum())
    with jax.transfer_guard("disallow"):
        with Loader(numbered(35), batch_size=8, seed=0, sharding=mesh_sharding(8)) as loader:
            taken = [next(loader) for _ in range(3)]
            for batch in taken:
                update(batch)
    for batch, reference in zip(taken, expected, strict=True):
        assert batch["image"].shape == (8, 2, 2, 3) and batch["image"].sharding == mesh_sharding(8)
        assert len(batch["index"].addressable_shards) == 8
        for key in reference:
            np.testing.assert_array_equal(jax.device_get(batch[key]), reference[key])
            assert batch[key].dtype == reference[key].dtype


def test_global_guard_does_not_stop_the_thread():
    old = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        take(numbered(16), 2, sharding=mesh_sharding(2))
    finally:
        jax.config.update("jax_transfer_guard", old)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"batch_size": 36}, "larger than arrays .train. with 35 images; use at most 35"),
        ({"batch_size": 9, "process_count": 2}, "shared equally by 2 processes"),
        ({"batch_size": 0}, "at least 1"),
        ({"prefetch": 0}, "at least 1"),
        ({"start_step": -1}, "at least 0"),
        ({"process_index": 2, "process_count": 2}, "from 0 to 1"),
    ],
)
def test_mistakes(options, match):
    with pytest.raises(UserError, match=match) as caught:
        Loader(numbered(35), **{"batch_size": 8, "seed": 0, **options})
    assert "\n" not in str(caught.value)


def test_batch_as_large_as_the_set():
    assert [sorted(b) for b in ids(take(numbered(8), 3))] == [list(range(8))] * 3


def test_batches_of_one():
    assert sorted(sum(ids(take(numbered(5), 5, batch_size=1)), [])) == list(range(5))


def test_an_error_while_reading_reaches_the_consumer():
    with Loader(OnDisk(8, fail_at=5), batch_size=8, seed=0) as loader:
        for _ in range(2):  # every later call raises it again
            with pytest.raises(OSError, match="disk on fire"):
                next(loader)


def test_seconds_waited_counts_only_waiting():
    with Loader(numbered(64), batch_size=8, seed=0) as loader:
        assert loader.seconds_waited == 0 and loader.steps_per_epoch == 8 and loader.step == 0
        next(loader)
        time.sleep(0.5)  # the consumer is busy; two batches are made meanwhile
        before = loader.seconds_waited
        next(loader), next(loader)
        assert loader.seconds_waited - before < 0.25 and loader.step == 3
    slow = numbered(64)
    object.__setattr__(slow, "batch", lambda rows, give=slow.batch: (time.sleep(0.1), give(rows))[1])
    with Loader(slow, batch_size=8, seed=0) as loader:
        for _ in range(4):
            next(loader)
        assert loader.seconds_waited > 0.25


def threads():
    return [t for t in threading.enumerate() if t.name == "jaxcl-loader"]


def test_close_ends_the_thread():
    loader = Loader(numbered(64), batch_size=8, seed=0)
    assert len(threads()) == 1
    loader.close()
    loader.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(loader)
    Loader(numbered(64), batch_size=8, seed=0)  # dropped unused: nothing refers to it any more
    assert not threads()


def test_interpreter_exits_with_open_loaders():
    code = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import numbered_sources as t; from jaxcl.data import Loader\n"
        "options = dict(batch_size=64, seed=0, sharding=t.mesh_sharding(1))\n"
        "loaders = [Loader(make(512), **options) for make in (t.numbered, t.OnDisk)]\n"
        "print(*[next(loader)['image'].shape for loader in loaders])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "(64, 2, 2, 3) (64, 2, 2, 3)\n", done.stderr
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("n, size", [(10, 4), (8, 4), (3, 8)])
def test_evaluation_passes_are_padded_to_one_shape(n, size):
    seen = []
    for batch in batches(numbered(n), size):
        assert batch["image"].shape == (size, 2, 2, 3) and batch["where"].shape == (size,)
        assert (batch["label"][~batch["where"]] == -1).all() and (batch["index"][~batch["where"]] == -1).all()
        assert not batch["image"][~batch["where"]].any()
        seen += batch["index"][batch["where"]].tolist()
        assert (batch["image"][batch["where"], 0, 0, 0] == batch["index"][batch["where"]]).all()
    assert seen == list(range(n))
    assert len(list(batches(numbered(n), size))) == -(-n // size)
    with pytest.raises(UserError):
        next(batches(numbered(3), 0))
