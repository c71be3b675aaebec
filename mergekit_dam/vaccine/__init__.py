"""Vaccination: backdoors of our own are planted in a model and unlearned, and an unknown one goes with them.

Nothing is searched and nothing has to be found. Reading order: `clean` (the procedure), `training` (one phase of it),
`triggers` and `behaviours` (what is planted), `settings`.
"""
