"""Plans: what a training step and a decoding pass would take on a machine that need not be there."""
