"""`jaxcl plan`: `counts` makes the numbers, `text` and `figure` show them, `main` is the command.

`program_costs` reads jaxprs, `collectives` reads compiled programs and `chips` has the makers' numbers. None of them
runs a program or knows a method; measured times belong in `train.profile` and benchmarks/.
"""
