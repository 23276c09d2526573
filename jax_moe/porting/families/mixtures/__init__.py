"""Model types known by the mixtures of their layers: a file for each group of contracts, a line for each type."""
