"""What is handed on: masks of predictions and labels, in the formats that others read."""
