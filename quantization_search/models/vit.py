"""Vision transformers that torchvision lacks (Dosovitskiy et al., arXiv 2010.11929; tiny: DeiT, arXiv 2012.12877)."""

from torch import nn
from torchvision.models import VisionTransformer

TINY = {"hidden_dim": 192, "mlp_dim": 768, "num_heads": 3}


def vit_tiny_patch16_224(num_classes, input_size=224):
    """ViT-Ti with patches of 16x16 pixels and 12 blocks, 5.7 M weights; images of any multiple of 16 pixels."""
    return _vision_transformer(num_classes, input_size, patch_size=16, num_layers=12, **TINY)


def vit_tiny_patch4_32(num_classes, input_size=32):
    """The same width with patches of 4x4 pixels and 6 blocks, 2.7 M weights, for small images: any multiple of 4 pixels."""
    return _vision_transformer(num_classes, input_size, patch_size=4, num_layers=6, **TINY)


def _vision_transformer(num_classes, input_size, **options):
    model = VisionTransformer(image_size=input_size, num_classes=num_classes, **options)
    nn.init.trunc_normal_(model.class_token, std=0.02)
    return model
