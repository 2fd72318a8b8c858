"""What a run on a pod would need and take, without the pod.

    python -m jaxcl plan --config=configs/simclr.py:imagenet --devices=256 --kind=v5p [--hosts=64] [--out=DIR]

Prints memory of a device, work and traffic of a step, and a table of weak scaling; says of every number whether it is
counted or assumed. --out also writes plan.json and weak_scaling.png. Needs no data: --images, --side and --classes
describe a set that is not at hand. Any --config.KEY=VALUE holds. Runs on the CPU with as many fake devices as the
table has, whatever the machine has.
"""

import json
import os
import pathlib
from typing import Any

from absl import flags

from jaxcl.runtime.flags import leave

# What a plan has to know of sets that are seldom on the machine that plans: images, side as stored here, classes.
SETS = {
    "tfds:imagenet2012": (1_281_167, 256, 1000),
    "tfds:cifar10": (50_000, 32, 10),
    "tfds:cifar100": (50_000, 32, 100),
    "folder:imagenet100": (126_689, 256, 100),
}


def define_flags() -> flags.FlagValues:
    """The options of this command; those of the config are read with the config."""
    values = flags.FlagValues()
    own = dict(flag_values=values)
    flags.DEFINE_integer("devices", None, "Devices of the run.", lower_bound=1, **own)
    flags.DEFINE_string("kind", "v5p", "The chip: v4, v5e, v5p, v6e, A100, H100.", **own)
    flags.DEFINE_integer("hosts", 0, "Hosts (processes); 0: as many as the chip's servers.", lower_bound=0, **own)
    flags.DEFINE_string("out", None, "A folder for plan.json and weak_scaling.png.", **own)
    flags.DEFINE_integer("images", 0, "Training images of a set that is not at hand.", **own)
    flags.DEFINE_integer("side", 0, "Side of its images in pixels.", **own)
    flags.DEFINE_integer("classes", 0, "Its classes.", **own)
    flags.DEFINE_integer("most", 1024, "Devices in the last row of the table.", lower_bound=1, **own)
    return values


def fake_devices(count: int) -> None:
    """So many CPU devices in this process; before anything starts JAX."""
    others = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    # Only small programs are compiled, to be looked at and not to be run.
    quick = [f"--xla_force_host_platform_device_count={count}", "--xla_backend_optimization_level=0"]
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join([*others, *quick]))
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)


def main(argv: list[str]) -> int:
    """Print the plan; -> exit code."""
    from jaxcl.errors import UserError

    given = define_flags()
    config_argument, overrides, own = "", [], [argv[0]]
    for argument in argv[1:]:
        if argument.startswith("--config="):
            config_argument = argument.partition("=")[2]
        elif argument.startswith("--config."):
            overrides.append(argument)
        else:
            own.append(argument)
    try:
        rest = given(own)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    if not config_argument or not given.devices:
        raise UserError("expected, for example, --config=configs/simclr.py:imagenet --devices=256 --kind=v5p")
    from jaxcl.commands.plan.chips import CHIPS

    if given.kind not in CHIPS:
        raise UserError(f"--kind is {given.kind!r}; expected one of {', '.join(CHIPS)}")
    fake_devices(max(given.most, given.devices))
    from jaxcl.commands.plan import counts as plan_counts
    from jaxcl.main import read_config

    config = read_config(config_argument, overrides)
    plan = plan_counts.make_plan(
        config, facts(config, given), devices=given.devices, kind=given.kind, hosts=given.hosts, most=given.most
    )
    print(plan_counts.as_text(plan))
    if given.out:
        out = pathlib.Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
        plan_counts.draw(plan, out / "weak_scaling.png")
    return 0


def facts(config: Any, given: flags.FlagValues) -> dict[str, Any]:
    """What a recipe has to know of the data: from the flags, a table, or the data itself. Errors: UserError."""
    from jaxcl.data import source_of
    from jaxcl.method.build import data_facts

    described = (given.images, given.side, given.classes)
    known = described if all(described) else SETS.get(config.data.source)
    if known is None:
        return data_facts(source_of(config, "train"))
    images, side, classes = known
    moments = dict(mean=(0.5,) * 3, std=(0.25,) * 3)  # of no consequence here
    return dict(num_examples=images, image_shape=(side, side, 3), num_classes=classes, labelled=True, **moments)


if __name__ == "__main__":
    leave(main)
