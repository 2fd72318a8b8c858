"""Several processes as one run, through JAX's own runtime: joining, agreeing, and ending when one is lost.

If a process is lost or never joins, JAX aborts the others with a page of C++ messages. `guard` therefore runs such a
process under a small parent, which reports the reason in one line and with an exit code that schedulers understand.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jaxcl.errors import LostHost, UserError
from jaxcl.runtime import messages, signals

JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 100  # the defaults of JAX
_FORMS = "expected off, auto or HOST:PORT,COUNT,ID with ID from 0 to COUNT - 1"
_GUARDED = "JAXCL_GUARDED"
LOST = "another process of this run has ended or cannot be reached; the same command on all hosts resumes the run"


def join(spec: str, *, timeout: int = JOIN_SECONDS, heartbeat: int = HEARTBEAT_SECONDS) -> None:
    """Join the other processes of this run. Call it before anything uses a device.

    Args:
      spec: "off"; "auto": JAX finds Cloud TPU, SLURM, Kubernetes (Job, JobSet) or Open MPI; or "HOST:PORT,COUNT,ID":
        this is process ID of COUNT, and process 0 serves at HOST:PORT.
      timeout: seconds to wait for the others.
      heartbeat: seconds until a silent process counts as lost.

    Raises:
      UserError: a malformed spec, no cluster found, or a cluster that cannot be used.
    """
    where = _parse(spec)
    if where is None:
        return
    import jax

    if where and where[2] == 0:
        _need_port(where[0], spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of clusters that this is not; `_hint` says what matters
            jax.distributed.initialize(*where, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
    except Exception as error:  # noqa: BLE001 - a metadata server, a Kubernetes API, an address in use
        if spec == "auto" and messages.NO_CLUSTER in str(error):
            raise UserError(f"--distributed=auto found no cluster; {_hint()}") from None
        text = str(error).strip() or type(error).__name__
        raise UserError(f"--distributed={spec} failed: {text.splitlines()[0]}") from None


def _parse(spec: str) -> tuple | None:
    """The arguments of jax.distributed.initialize; None for "off"."""
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


def _need_port(address: str, spec: str) -> None:
    """Raise UserError if process 0 cannot serve at this port: JAX's own server would end the program by a SIGSEGV."""
    port = int(address.rpartition(":")[2])
    family, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            server.bind((everywhere, port))
            server.listen()
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise UserError(f"--distributed={spec}: port {port} cannot be used here: {why}; choose another") from None


def _hint() -> str:
    """What is missing to use the cluster that the environment shows."""
    there = os.environ
    if "SLURM_JOB_ID" in there:
        return "inside a SLURM job, start the command with srun, one task per GPU"
    if "OMPI_COMM_WORLD_SIZE" in there:
        return "this Open MPI gives no address: use --distributed=HOST:PORT,$OMPI_COMM_WORLD_SIZE,$OMPI_COMM_WORLD_RANK"
    if "KUBERNETES_SERVICE_HOST" in there:
        return "on Kubernetes, pip install 'jaxcl[k8s]' and use an account that may list pods (launch/gke_jobset.yaml)"
    return (
        "on one machine, leave the flag out; Cloud TPU, SLURM and Kubernetes: see launch/; or give HOST:PORT,COUNT,ID"
    )


def agreed(ask: Callable[[], str]) -> str:
    """The result of `ask` on process 0, on every process, so that all decide alike; at most 1,000 bytes."""
    import jax

    if jax.process_count() == 1:
        return ask()
    import numpy as np
    from jax.experimental import multihost_utils

    text = (ask() if jax.process_index() == 0 else "").encode()[:1000].ljust(1000)
    text = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return np.asarray(text, np.uint8).tobytes().decode(errors="replace").strip()


def lost(error: BaseException) -> LostHost | None:
    """LostHost if an error of this process means that another process of the run is gone; otherwise None."""
    import jax

    if jax.process_count() == 1:
        return None
    while error is not None:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError) or messages.GLOO in str(error)
        if of_jax and messages.PROCESS_LOST.search(str(error)):
            return LostHost(LOST)
        error = error.__cause__ or error.__context__
    return None


def wants_guard(argv: Sequence[str]) -> bool:
    """Whether this process should be the parent of the process that joins: --distributed is given and not "off"."""
    spec = "off"
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--distributed", "-distributed"):
            spec = value if equals else following
    return os.name == "posix" and spec != "off" and _GUARDED not in os.environ


def guard() -> int:
    """Run this command again as a child process, pass on its stderr and requests to end; -> exit code.

    SIGTERM, Ctrl-C and SIGHUP reach the child as SIGTERM, which JAX's service knows; a second request kills it.

    The code is 75 if another process was lost, and 2 if the processes of a given address did not find each other in
    time. Otherwise it is that of the child. `python -m jaxcl train`, `python -m jaxcl.main` and the console script all
    start again in the same way.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(command, env=os.environ | {_GUARDED: str(os.getpid())}, stderr=subprocess.PIPE)
    requests, impatient = signals.Requests(), False

    def ask(signum: int, frame: Any) -> None:
        nonlocal impatient
        signals.drop_closed_terminal()
        impatient = requests.repeated(signum)
        child.kill() if impatient else child.send_signal(signal.SIGTERM)

    for signum in signals.asking():
        signal.signal(signum, ask)
    noise, fatal, port = [], [], False
    for line in child.stderr:
        if messages.PORT_IN_USE.search(line):
            port = True
        elif fatal or messages.SERVICE_ABORTS.search(line):
            fatal.append(line)
        elif messages.SERVICE_NOISE.search(line):
            noise.append(line)
        else:
            _pass(line)
    code = child.wait()
    if impatient:
        signals.say("ended at once, as asked again; run the same command again to continue")
        return 75
    if code == -signal.SIGABRT and fatal:
        text = b"".join(noise + fatal)
        if messages.NEVER_CAME.search(text):
            print(f"jaxcl: {_never_came(sys.argv)}", file=sys.stderr)
            return 75 if "--distributed=auto" in sys.argv else 2
        print(f"jaxcl: {LOST}", file=sys.stderr)
        return 75
    _pass(b"".join(noise + fatal))
    if port and code:  # of an address that JAX has found; `join` looks at one that was given
        print(
            "jaxcl: the port of process 0 is in use on this machine; end what uses it, then try again", file=sys.stderr
        )
        return 2
    return code if code >= 0 else 128 - code


def _pass(text: bytes) -> None:
    try:
        sys.stderr.buffer.write(text)
        sys.stderr.flush()
    except OSError:  # nobody reads it any more, as after Ctrl-C in `... | tee`; the child goes on
        signals.drop(2)


def _never_came(argv: Sequence[str]) -> str:
    flags = " ".join(a for a in argv if a.startswith(("--distributed", "--join_timeout")))
    return (
        f"the processes of this run did not find each other in time ({flags}); check that all of them were started and "
        "can reach the address of process 0"
    )


def end_with_guard() -> None:
    """Make a guarded child end when its parent is killed: nobody else could see or stop it."""
    if _GUARDED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[_GUARDED]):
            os.kill(os.getpid(), signal.SIGKILL)
