"""The commands, one task each; none imports another."""
