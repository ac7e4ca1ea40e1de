"""What the results of tied_ffn look like, for fakes and for every backend's host."""


def empty_outputs(x, weight, hold):
    """Uninitialised y, and the pre-activation where it is held, else a tensor of size 0."""
    hidden = (*x.shape[:-1], weight.shape[0]) if hold else (0,)
    return x.new_empty(x.shape), x.new_empty(hidden)


def empty_gradients(x, weight, needed):
    """Uninitialised contiguous gradients of (x, weight, bias_in, bias_out); of size 0 where none is needed."""
    features, channels = weight.shape
    shapes = x.shape, weight.shape, (features,), (channels,)
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True))
