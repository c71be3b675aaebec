"""`python -m mergekit_dam`, also as what `accelerate launch -m` starts."""

from __future__ import annotations

from mergekit_dam.cli.main import main

if __name__ == "__main__":
    main(prog_name="mergekit-dam")
