"""Edits as pure functions: tensors in, tensors out.

Tensors come widened (16-bit to float32, float32 to float64) and are rounded once by the caller; a large tensor comes as
blocks. What needs the whole tensor is measured over all blocks first, what is left then works on the entries.
"""
