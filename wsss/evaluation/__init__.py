"""Evaluation: what is measured, and under which protocol."""
