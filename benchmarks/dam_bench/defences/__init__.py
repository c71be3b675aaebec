"""Rival defences: our own implementations from the papers' formulas, in one registry, with the same data as `dam`."""
