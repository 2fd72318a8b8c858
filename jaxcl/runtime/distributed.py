"""Several processes as one run, through JAX's own runtime: how they find each other, agree, and end when one is lost.

JAX answers a lost process, or one that never came, by aborting the others with a page of C++. `guard` therefore keeps
such a process under a small parent, which says it in one line and with an exit code that schedulers understand.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

from jaxcl.errors import LostHost, UserError

JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 100  # JAX's own
_FORMS = "expected off, auto or HOST:PORT,COUNT,ID with ID from 0 to COUNT - 1"
_GUARDED = "JAXCL_GUARDED"
# What abseil writes before it aborts, and single lines of the runtime on the way there.
_FATAL = re.compile(rb"^F\d{4} .*distributed service detected fatal errors|^terminate called")
_ASIDE = re.compile(
    rb"^[WE]\d{4} .*coordination\w*\.(cc|h):\d+\]|^RPC: /xla\.coordination|CoordinationServiceError|^\d*$"
)
_LOST = re.compile(
    "gloo|connection (closed|reset|refused)|socket closed|broken pipe|coordination|heartbeat|barrier|UNAVAILABLE"
    "|DEADLINE_EXCEEDED|ABORTED",
    re.I,
)
LOST = "another process of this run has ended or cannot be reached; the same command on all hosts goes on from there"


def join(spec: str, *, timeout: int = JOIN_SECONDS, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Join the other processes of this run; before anything touches a device.

    Args:
      spec: "off"; "auto": Cloud TPU, SLURM, Kubernetes (Job, JobSet) or Open MPI, as JAX finds them; or
        "HOST:PORT,COUNT,ID": process ID of COUNT, of which process 0 serves at HOST:PORT.
      timeout: seconds to wait for the others.
      heartbeat: seconds after which a silent process is taken for dead.

    Raises:
      UserError: a malformed spec, no cluster found, or a cluster that cannot be used.
    """
    where = _parse(spec)
    if where is None:
        return
    import jax

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of clusters that are not this one; `_hint` says what matters
            jax.distributed.initialize(*where, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
    except Exception as error:  # noqa: BLE001 - a metadata server, a Kubernetes API, an address in use
        if spec == "auto" and "coordinator_address should be defined" in str(error):
            raise UserError(f"--distributed=auto found no cluster; {_hint()}") from None
        text = str(error).strip() or type(error).__name__
        raise UserError(f"--distributed={spec} failed: {text.splitlines()[0]}") from None


def _parse(spec: str) -> tuple | None:
    """The arguments of jax.distributed.initialize; None for off."""
    if spec == "off":
        return None
    if spec == "auto":
        return ()
    try:
        address, count, index = spec.split(",")
        count, index = int(count), int(index)
    except ValueError:
        raise UserError(f"--distributed is {spec!r}; {_FORMS}") from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or not 0 <= index < count:
        raise UserError(f"--distributed is {spec!r}; {_FORMS}")
    return address, count, index


def _hint() -> str:
    """What of a cluster shows in the environment and is not enough."""
    there = os.environ
    if "SLURM_JOB_ID" in there:
        return "inside a SLURM job the command must be started by srun, one task a GPU"
    if "OMPI_COMM_WORLD_SIZE" in there:
        return "this Open MPI tells no address: use --distributed=HOST:PORT,$OMPI_COMM_WORLD_SIZE,$OMPI_COMM_WORLD_RANK"
    if "KUBERNETES_SERVICE_HOST" in there:
        return (
            "on Kubernetes it needs pip install 'jaxcl[k8s]' and an account that may list pods (launch/gke_jobset.yaml)"
        )
    return "on one machine leave it out; for Cloud TPU, SLURM and Kubernetes see launch/; or give HOST:PORT,COUNT,ID"


def agreed(ask: Callable[[], str]) -> str:
    """What process 0 finds, on every process, so that all go the same way; at most 1,000 bytes."""
    import jax

    if jax.process_count() == 1:
        return ask()
    import numpy as np
    from jax.experimental import multihost_utils

    text = (ask() if jax.process_index() == 0 else "").encode()[:1000].ljust(1000)
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return np.asarray(text, np.uint8).tobytes().decode(errors="replace").strip()


def lost(error: BaseException) -> LostHost | None:
    """What an error in a run of several processes means, where it is that another one is gone."""
    import jax

    if jax.process_count() == 1:
        return None
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            return LostHost(LOST)
        error = error.__cause__ or error.__context__
    return None


def wants_guard(argv: Sequence[str]) -> bool:
    """Whether this process is to be the parent of the one that joins."""
    spec = "off"
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--distributed", "-distributed"):
            spec = value if equals else following
    return os.name == "posix" and spec != "off" and _GUARDED not in os.environ


def guard() -> int:
    """Run this very command again as a child, pass on its words and SIGTERM; -> exit code.

    75 where another process was lost, 2 where those of an address given by hand never came together.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, env=os.environ | {_GUARDED: str(os.getpid())}, stderr=subprocess.PIPE)
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    aside, fatal = [], []
    for line in child.stderr:
        if fatal or _FATAL.search(line):
            fatal.append(line)
        elif _ASIDE.search(line):
            aside.append(line)
        else:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
    code = child.wait()
    if code == -signal.SIGABRT and fatal:
        text = b"".join(aside + fatal)
        if b"RegisterTask" in text or b"Wait_for_all_tasks_to_register" in text:
            print(f"jaxcl: {_never_came(sys.argv)}", file=sys.stderr)
            return 75 if "--distributed=auto" in sys.argv else 2
        print(f"jaxcl: {LOST}", file=sys.stderr)
        return 75
    sys.stderr.buffer.write(b"".join(aside + fatal))
    return code if code >= 0 else 128 - code


def _never_came(argv: Sequence[str]) -> str:
    said = " ".join(a for a in argv if a.startswith(("--distributed", "--join_timeout")))
    return (
        f"the processes of this run did not find each other in time ({said}); are all of them started, and may they "
        "reach the address of process 0?"
    )


def end_with_guard() -> None:
    """A child whose parent is killed ends too: nobody would see it train on, or could stop it."""
    if _GUARDED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_GUARDED]):
            os.kill(os.getpid(), signal.SIGKILL)
