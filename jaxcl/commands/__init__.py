"""The commands: `jaxcl NAME ...`, or `python -m jaxcl NAME ...`. jaxcl/__main__.py has the table of names.

A command is a module, or the `main.py` of a folder, with two names: `FLAGS`, its flags, and `main(argv)`, which returns
the exit code. Code that other rooms need does not belong here: nothing below `jaxcl.main` imports a command.
"""
