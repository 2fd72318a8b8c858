"""`jaxcl compare`: `runs` measures runs side by side, `sweeps` reads the curves of a sweep, `main` is the command.

The figures belong in `report`, and the table of a sweep in `commands.sweep`.
"""
