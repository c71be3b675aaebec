"""Defense-Aware Merging for mergekit: merge fine-tuned models without merging a backdoor."""

__version__ = "0.1.0"
