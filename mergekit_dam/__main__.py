"""Run the commands as `python -m mergekit_dam`, which `accelerate launch -m` needs."""

from __future__ import annotations

from mergekit_dam.cli.main import main

if __name__ == "__main__":
    main(prog_name="mergekit-dam")
