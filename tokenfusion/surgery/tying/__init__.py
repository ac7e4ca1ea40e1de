"""Which modules `tie_weights` can give one matrix in place of several, how, and when not. A file a family."""

from tokenfusion.surgery.tying import resnet, transformer

RULES = (*transformer.RULES, *resnet.RULES)
