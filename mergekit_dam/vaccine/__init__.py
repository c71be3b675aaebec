"""Vaccination: plant backdoors of our own in a model and unlearn them; an unknown backdoor goes with them.

No trigger has to be found. Reading order: `clean` (the procedure), `training` (one phase of it),
`triggers` and `behaviours` (what is planted), `settings`.
"""
