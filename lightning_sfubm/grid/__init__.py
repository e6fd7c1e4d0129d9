"""A grid of experiments: pairs of domains x methods x seeds, run cell by cell, and the tables built from the cells."""
