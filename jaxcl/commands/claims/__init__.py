"""`jaxcl claims`: `methods` says what is trained and claimed, `table` judges the results, `page` shows them.

This is the only code that knows which parts a paper uses. The runs are those of `commands.sweep`.
"""
