"""One folder for each operation: the specification, the fused backends and the choice among them."""
