"""Estimate memory and time of a run on a pod, without the pod.

    jaxcl plan --config=configs/simclr.py:imagenet --devices=256 --kind=v5p [--hosts=64] [--out=DIR]

The command prints the memory of a device, the work and the traffic of a step, and a table of weak scaling; the text
says which numbers are counted and which are assumed. --out also gets plan.json and weak_scaling.png. The data need not
be there if --images, --side and --classes describe them. --config.KEY=VALUE works as for jaxcl train. The command runs
on the CPU of any machine, with as many fake devices as the table needs.
"""

import json
import os
import pathlib
import types
from typing import Any

from jaxcl.commands.config_file import read_config
from jaxcl.commands.plan.chips import CHIPS
from jaxcl.errors import UserError
from jaxcl.runtime import storage
from jaxcl.runtime.flags import Flags

# Sets that are rarely on the machine that plans: name -> (images, side in pixels as stored here, classes).
SETS = {
    "tfds:imagenet2012": (1_281_167, 256, 1000),
    "tfds:cifar10": (50_000, 32, 10),
    "tfds:cifar100": (50_000, 32, 100),
    "folder:imagenet100": (126_689, 256, 100),
}

FLAGS = Flags(__doc__, config=True)
FLAGS.number("devices", None, "Devices of the run.", at_least=1)
FLAGS.text("kind", "v5p", f"The chip: {', '.join(CHIPS)}.")
FLAGS.number("hosts", 0, "Hosts (processes); 0: as many as the chip's servers.", at_least=0)
FLAGS.path("out", "", "A folder for plan.json and weak_scaling.png.")
FLAGS.number("images", 0, "Training images, if the data are not on this machine.")
FLAGS.number("side", 0, "Side of these images in pixels.")
FLAGS.number("classes", 0, "Number of their classes.")
FLAGS.number("most", 1024, "Devices in the last row of the table.", at_least=1)


def fake_devices(count: int) -> None:
    """Give this process `count` CPU devices; call it before JAX starts its backends."""
    others = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    # The programs are small, and they are compiled to be read, not to be run.
    quick = [f"--xla_force_host_platform_device_count={count}", "--xla_backend_optimization_level=0"]
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join([*others, *quick]))
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)


def main(argv: list[str]) -> int:
    """Print the plan; -> exit code."""
    given = FLAGS.parse(argv)
    if not given.config or not given.devices:
        raise UserError("no --config or no --devices; for example --config=configs/simclr.py:imagenet --devices=256")
    if given.kind not in CHIPS:
        raise UserError(f"--kind is {given.kind!r}; expected one of {', '.join(CHIPS)}")
    fake_devices(max(given.most, given.devices))
    config = read_config(given.config, given.overrides)
    from jaxcl import config as configs  # late: JAX reads JAX_PLATFORMS when it is imported
    from jaxcl.commands.plan import counts, figure, text

    configs.check(config)
    plan = counts.make_plan(
        config, facts(config, given), devices=given.devices, kind=given.kind, hosts=given.hosts, most=given.most
    )
    print(text.as_text(plan))
    if given.out:
        out = pathlib.Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        storage.write_whole(out / "plan.json", json.dumps(plan, indent=1) + "\n")
        figure.draw(plan, out / "weak_scaling.png")
    return 0


def facts(config: Any, given: types.SimpleNamespace) -> dict[str, Any]:
    """The facts of the data that a recipe needs: from the flags, from SETS or from the data. Raises: UserError."""
    from jaxcl.data import source_of
    from jaxcl.method.build import data_facts

    described = (given.images, given.side, given.classes)
    known = described if all(described) else SETS.get(config.data.source)
    if known is None:
        return data_facts(source_of(config, "train"))
    images, side, classes = known
    moments = dict(mean=(0.5,) * 3, std=(0.25,) * 3)  # they do not change the cost
    return dict(num_examples=images, image_shape=(side, side, 3), num_classes=classes, labelled=True, **moments)
