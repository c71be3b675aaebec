"""Commands of `mergekit-dam`, one module each; `cli.COMMANDS` registers them."""
