"""Attention that spreads maps: the transition and the choice of layers against loops; boxes: parity."""

import numpy as np
import torch

from wsss.refine.affinity import agreeing_layers, boxes, refined_attention, spread, transition


def test_transition() -> None:
    attention = torch.rand(2, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-3
    for image, found in zip(attention.numpy().copy(), transition(attention).numpy(), strict=True):
        for _ in range(3):
            for j in range(6):
                image[:, j] /= image[:, j].sum()
            for i in range(6):
                image[i] /= image[i].sum()
        middle = (image + image.T) / 2
        np.testing.assert_allclose(found, middle @ middle, rtol=1e-12)


def test_spread_comes_from_inside_of_the_boxes() -> None:
    cam = torch.zeros(1, 4, 5)
    cam[0, 1, 1:3], cam[0, 3, 4] = torch.tensor([1.0, 0.9]), 0.3
    assert boxes(cam[0], 0.4).tolist() == [[1, 1, 3, 2]]
    matrix = torch.rand(1, 20, 20)
    expected = matrix[0, :, 6] * 1.0 + matrix[0, :, 7] * 0.9
    torch.testing.assert_close(spread(cam, matrix, 0.4).flatten(), expected)
    torch.testing.assert_close(spread(cam, matrix, None).flatten(), expected + matrix[0, :, 19] * 0.3)
    assert boxes(cam[0] * 0, 0.4).shape == (0, 4)
    assert (spread(cam * 0, matrix, 0.4) == 0).all()


def test_layers_that_agree() -> None:
    attention, affinity = torch.rand(4, 2, 5, 5), torch.rand(2, 5, 5)
    distance, kept = agreeing_layers(attention, affinity)
    refined = refined_attention(attention, affinity)
    for image in range(2):
        sums = [float((affinity[image] - attention[layer, image]).sum()) for layer in range(4)]
        np.testing.assert_allclose(distance[image], sums, rtol=1e-4, atol=1e-5)
        chosen = [layer for layer in range(4) if sums[layer] <= np.mean(sums)]
        assert kept[image].nonzero()[:, 0].tolist() == chosen
        expected = attention[chosen, image].mean(0) * affinity[image]
        torch.testing.assert_close(refined[image], expected)
