"""`jaxcl sweep`: `runs` lists the runs, `main` starts them as processes, `table` makes the table of their results.

What one run does belongs in `train`; what its numbers mean belongs in `report` and `evaluate`.
"""
