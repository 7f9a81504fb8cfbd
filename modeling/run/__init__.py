"""Stage 2's shell around the core: one training run, from its identity to its last file."""
