"""Cases, readers, folds, simulated coarse masks, and the loaders made of them."""
