"""Edit operations: tensors in, tensors out. Nothing here knows a checkpoint, a layer or a recipe."""
