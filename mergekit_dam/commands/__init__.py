"""Commands of `mergekit-dam`, one module each."""
