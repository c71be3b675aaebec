"""Vaccination: plant backdoors of our own in a model and unlearn them; an unknown backdoor goes with them.

No trigger has to be found. Reading order: `clean` (the procedure), `training` (one phase of it),
`triggers` and `behaviours` (what is planted), `settings`.
"""

from __future__ import annotations

from mergekit_dam.vaccine import image_kinds as _image_kinds  # noqa: F401 (registers its kinds)
from mergekit_dam.vaccine import text_kinds as _text_kinds  # noqa: F401 (likewise)
