"""`python -m mergekit_dam`, which is what `accelerate launch -m` starts."""

from mergekit_dam.cli import main

if __name__ == "__main__":
    main()
