"""Model families, one file each: what can be removed from a model and what must leave together."""
