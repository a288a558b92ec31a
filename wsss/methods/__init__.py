"""One published method per file, each a LightningModule that reads top to bottom."""
