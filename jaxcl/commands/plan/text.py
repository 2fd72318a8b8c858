"""A plan as text."""

from jaxcl.commands.plan.counts import Plan


def as_text(plan: Plan) -> str:
    """The plan, for the terminal."""
    p, m = plan, plan["memory"]
    mine = next(r for r in p["table"] if r["devices"] == p["devices"])
    low, high = (1e3 * s for s in mine["step_seconds"])
    lines = [
        f"{p['config'] or 'plan'}: {p['devices']} x {p['kind']} on {p['hosts']} hosts, batch {mine['batch']} "
        f"({p['images_per_device']} images per device), sharding={p['sharding']}, {p['dtype']}",
        "",
        "Memory of one device",
        *(f"  {k:<28}{size(v):>12}" for k, v in m.items() if k != "loss"),
        f"  {'in all':<28}{size(p['memory_needed']):>12}  of {size(p['memory_of_chip'])} on the chip",
        f"  {'(of these, the loss)':<28}{size(m['loss']):>12}  {mine['loss']}",
        "",
        f"One step of {p['steps']:,}",
        *(
            f"  {what:<28}{amount:>12}  {1e3 * mine[seconds]:>9.2f} ms at peak"
            for what, amount, seconds in (
                ("work of a device", f"{p['flops'] / 1e9:,.0f} GFLOP", "compute_seconds"),
                ("memory read and written", size(p["moved"]), "memory_seconds"),
                ("sent by a device", size(sum(mine["sent"].values())), "send_seconds"),
            )
        ),
        *(f"    {k:<26}{size(v):>12}" for k, v in mine["sent"].items() if v),
        f"  step                        {low:.2f} ms if all of that overlaps, {high:.2f} ms if sending does not",
        "",
        "Weak scaling, with the same number of images per device",
        "  devices      batch  loss       loss memory   sent by a device   step, ms          images/s",
    ]
    for r in p["table"]:
        a, z = r["step_seconds"]
        note = "" if r["known"] else "  (more than one pod: traffic between pods is not included)"
        lines.append(
            f"  {r['devices']:>7}{r['batch']:>11}  {r['loss']:<9}{size(r['loss_memory']):>13}"
            f"{size(sum(r['sent'].values())):>19}   {1e3 * a:>7.2f} - {1e3 * z:<7.2f}{r['batch'] / z:>14,.0f}{note}"
        )
    ring = p["ring_from"]
    lines += [
        "",
        f"The loss uses a ring from {ring} devices on."
        if ring
        else f"The loss does not use a ring up to {p['table'][-1]['devices']} devices; it does when the rows of one "
        f"device times all columns exceed {p['dense_logits']:,}.",
        "",
        "Counted: the state, from its shapes and shardings. Work, memory traffic and activations, from the jaxpr of",
        "  one device's update; it is not compiled. Results of products, reductions and loops are written to memory,",
        "  element-wise results are not. XLA's fusions and layouts differ, so expect an error of some tens of percent.",
        "  The loss: memory and traffic of the program that XLA compiles for each number of fake devices.",
        "Derived: traffic outside the loss, from the sizes of parameters and statistics. It was compared with the",
        "  compiled programs of small networks; a program may send a gradient once for each pass it comes from.",
        "Assumed: everything runs at the chip's peak rate, which no program reaches (ResNets stay far below it);",
        "  collectives use all links together and a step of a ring uses one; loading images takes no time.",
    ]
    if not p["fits"]:
        lines += [
            "",
            f"THIS DOES NOT FIT: a device needs {size(p['memory_needed'])}, a {p['kind']} has "
            f"{size(p['memory_of_chip'])}. Use more devices, --config.model.remat=True, a smaller batch, "
            "--config.grad_cache.micro_batch, or, if the state is large, --config.sharding=fsdp.",
        ]
    return "\n".join(lines)


def size(n: float) -> str:
    """Bytes with a unit, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError
