"""From class scores to pseudo labels: CAM arithmetic and pixel-adaptive refinement."""
