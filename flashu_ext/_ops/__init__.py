"""Typed functions over torch.ops.flashu.*, one file per family; `flashu_ext.ops` re-exports them."""
