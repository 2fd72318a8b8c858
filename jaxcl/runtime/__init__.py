"""What every command needs around the science: flags, typed options, the registry, storage, processes, compilation.

Belongs here: code that knows the operating system, the command line, several hosts or XLA's flags, and nothing of
images, encoders or losses. Does not: anything that imports another room than jaxcl.errors.
"""
