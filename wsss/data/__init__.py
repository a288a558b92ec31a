"""Data sets, transforms and the DataModule that serves all of them."""
