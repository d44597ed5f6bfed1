"""Hooks that let the loaders of other libraries open a pruned model, one file a library."""
