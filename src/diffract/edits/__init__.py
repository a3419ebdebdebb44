"""Edits of checkpoints: operations on tensors, recipes of steps, checkpoints and live models that they change."""
