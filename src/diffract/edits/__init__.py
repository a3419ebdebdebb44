"""Edits of checkpoints: operations as pure functions over tensors."""
