"""What other libraries write, as far as jaxcl tells cases apart by it: their words stand here and nowhere else.

An error's type or code is used wherever there is one. `tests/runtime/test_messages.py` makes each library say these
words, so that a new version which says others fails there, and not in front of a user.
"""

import re

# TensorStore, which Orbax writes with, passes an error of the disk on as text.
DISK_REFUSES = re.compile("no space left on device|disk quota exceeded|read-only file system", re.I)

# A warning of JAX: an entry of the compile cache that cannot be read or written, and why.
COMPILE_CACHE_WARNING = "Error (reading|writing) persistent compilation cache"
COMPILE_CACHE_FAILED = re.compile(COMPILE_CACHE_WARNING + r" entry for '([^']*)': (.*)", re.S)

# jax.distributed.initialize() where JAX recognises no cluster.
NO_CLUSTER = "coordinator_address should be defined"

# What abseil writes when JAX's coordination service ends the process, and the lines of the service before that.
SERVICE_ABORTS = re.compile(rb"^F\d{4} .*distributed service detected fatal errors|^terminate called")
SERVICE_NOISE = re.compile(
    rb"^[WE]\d{4} .*coordination\w*\.(cc|h):\d+\]|^RPC: /xla\.coordination|CoordinationServiceError|^\d*$"
)
# In these lines: not all processes came in time.
NEVER_CAME = re.compile(rb"RegisterTask|Wait_for_all_tasks_to_register")
# Process 0 cannot serve at its port; from gRPC.
PORT_IN_USE = re.compile(rb"Failed to add port to server|Failed to start RPC server")

# Errors of a process that is still there, after another one of its run has gone: of Gloo, of the service, of gRPC.
GLOO = "Gloo"
PROCESS_LOST = re.compile(
    "gloo|connection (closed|reset|refused)|socket closed|broken pipe|coordination|heartbeat|barrier|UNAVAILABLE"
    "|DEADLINE_EXCEEDED|ABORTED",
    re.I,
)

# numpy.load(allow_pickle=False) on an array of objects, and on what is no file of NumPy.
PICKLED = "pickle"

# Part of the paths of modules whose log lines are pages about a save that failed.
ORBAX_MODULES = "orbax"
