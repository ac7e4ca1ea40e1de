"""U-Net decoders: transposed convolutions whose kernel is their stride, and the concatenation of their result."""

from tokenfusion.layers.conv_transpose import ConvTranspose2d
from tokenfusion.surgery.rules.rule import DropInRule

RULES = (DropInRule("upconv_concat", ConvTranspose2d),)
