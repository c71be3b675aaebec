"""Commands of `mergekit-dam`, one module each; `main.COMMANDS` registers them."""
