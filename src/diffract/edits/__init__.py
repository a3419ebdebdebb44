"""Edits of checkpoints: what the tensors of one or several models become."""
