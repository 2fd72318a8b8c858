"""The words of other libraries by which jaxcl tells cases apart: each library is made to say them."""

import errno
import io
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import orbax.checkpoint
import pytest

from jaxcl.runtime import messages

ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "KUBERNETES", "JAX", "XLA"))} | {
    "JAX_PLATFORMS": "cpu"
}
INITIALIZE = "import jax; jax.distributed.initialize({where}, initialization_timeout=2, heartbeat_timeout_seconds=10)"
LOST = f"""
{INITIALIZE}
import os, numpy as np
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("both")
if jax.process_index():
    os._exit(0)
try:
    for _ in range(100):
        multihost_utils.process_allgather(np.ones(4))
except Exception as error:
    print(type(error).__name__, error)
    os._exit(0)
"""
CACHE = """
import os, sys, warnings, jax
double = lambda x: 2 * x + 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(double)(1.0)
    for name in os.listdir(sys.argv[1]):
        open(os.path.join(sys.argv[1], name), "wb").write(b"no program")
    jax.clear_caches()
    jax.jit(double)(1.0)
print(*(w.message for w in caught))
"""
FULL = """
import sys, numpy as np, tensorstore as ts
try:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": sys.argv[1]}, "metadata": {"compressor": None}}
    ts.open(spec, create=True, dtype=ts.float32, shape=[2**18]).result().write(np.ones(2**18, np.float32)).result()
except Exception as error:
    print(error)
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(code, *arguments, before=(), **environ):
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRON | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """{case: what its process wrote}; all of them at once, since most of them wait."""
    cache, disk, taken = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("disk"), socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    both, port = free_port(), free_port()
    running = {
        "no cluster": start(INITIALIZE.format(where="*()")),
        "the other never came": start(INITIALIZE.format(where=f"'127.0.0.1:{port}', 2, 0")),
        "nobody is there": start(INITIALIZE.format(where=f"'127.0.0.1:{free_port()}', 2, 1")),
        "port": start(INITIALIZE.format(where=f"'127.0.0.1:{taken.getsockname()[1]}', 1, 0")),
        "lost": start(LOST.format(where=f"'127.0.0.1:{both}', 2, 0").replace("timeout=2", "timeout=60")),
        "gone": start(LOST.format(where=f"'127.0.0.1:{both}', 2, 1").replace("timeout=2", "timeout=60")),
        "cache": start(
            CACHE,
            cache,
            JAX_COMPILATION_CACHE_DIR=str(cache),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        ),
    }
    if shutil.which("unshare"):
        mount = f'mount -t tmpfs -o size=64k tmpfs {disk} && exec "$@"'
        running["full"] = start(FULL, disk / "array", before=("unshare", "-rm", "sh", "-c", mount, "sh"))
    found = {name: process.communicate(timeout=120)[0] for name, process in running.items()}
    taken.close()
    return found | {f"{name}, code": process.returncode for name, process in running.items()}


def test_no_cluster(said):
    assert messages.NO_CLUSTER.encode() in said["no cluster"]


@pytest.mark.parametrize("case", ["the other never came", "nobody is there"])
def test_processes_that_never_come(said, case):
    lines = said[case].splitlines()
    fatal = [i for i, line in enumerate(lines) if messages.SERVICE_ABORTS.search(line)]
    assert fatal and messages.NEVER_CAME.search(said[case])
    before = [line for line in lines[: fatal[0]] if not messages.SERVICE_NOISE.search(line)]
    assert before == []  # they are not shown


def test_a_port_in_use(said):
    assert messages.PORT_IN_USE.search(said["port"])


def test_a_process_is_lost(said):
    text = said["lost"].decode(errors="replace")
    assert messages.PROCESS_LOST.search(text) and (messages.GLOO in text or "JaxRuntimeError" in text), text


def test_a_damaged_entry_of_the_compile_cache(said):
    assert messages.COMPILE_CACHE_FAILED.search(said["cache"].decode()).group(1) == "reading"


def test_a_full_disk(said):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        assert messages.DISK_REFUSES.search(os.strerror(number))
    if said.get("full, code", 1):
        pytest.skip("no file system can be mounted here")
    assert messages.DISK_REFUSES.search(said["full"].decode())


def test_what_is_pickled(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{}], object))
    with np.load(tmp_path / "objects.npz") as file, pytest.raises(ValueError, match=messages.PICKLED):
        file["images"]
    with pytest.raises(ValueError, match=messages.PICKLED):
        np.load(io.BytesIO(b"no file of NumPy"))


def test_where_orbax_is():
    assert messages.ORBAX_MODULES in orbax.checkpoint.__file__
