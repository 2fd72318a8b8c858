"""What every command needs around its work: flags, typed options, registries, storage, locks, start-up and exit.

A module belongs here if it knows nothing about images, models or training and imports only `jaxcl.errors` and other
modules of this folder. What is specific to training, such as checkpoints and the run folder, belongs in `train`.
"""
