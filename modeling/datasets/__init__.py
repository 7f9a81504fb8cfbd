"""Stage 1: the three data sets and their preparation."""
