"""The definition of dynamic_mixing against the formula written out, token by token."""

import torch

from tests.dynamic_mixing.cases import make_inputs
from tokenfusion.kernels.dynamic_mixing import reference


def written_out(x, compress_weight, compress_bias, generate_weight, generate_bias, *, segments, dim):
    """For each line and segment: compress, generate, softmax over sources, and a sum for each target."""
    lines = x.movedim(dim, 2)
    mixed = torch.empty_like(lines)
    length, width = lines.shape[2], lines.shape[3] // segments
    reduced = compress_weight.shape[0] // segments
    for image in range(lines.shape[0]):
        for line in range(lines.shape[1]):
            tokens = lines[image, line]
            for segment in range(segments):
                rows = slice(segment * reduced, (segment + 1) * reduced)
                flat = torch.cat([compress_weight[rows] @ token + compress_bias[rows] for token in tokens])
                logits = (generate_weight @ flat + generate_bias).reshape(length, length)
                channels = slice(segment * width, (segment + 1) * width)
                for target in range(length):
                    weights = logits[:, target].exp() / logits[:, target].exp().sum()
                    mixed[image, line, target, channels] = sum(
                        weights[source] * tokens[source, channels] for source in range(length)
                    )
    return mixed.movedim(2, dim)


def test_definition_is_the_formula():
    for dim in (1, 2):
        *tensors, _ = (t.detach() for t in make_inputs(2, 3, 4, 6, segments=2, dim=dim, dtype=torch.float64))
        expected = written_out(*tensors, segments=2, dim=dim)
        torch.testing.assert_close(reference.dynamic_mixing(*tensors, segments=2, dim=dim), expected)
