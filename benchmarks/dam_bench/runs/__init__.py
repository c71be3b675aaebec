"""Run methods on scenarios, and write a JSON per run."""
