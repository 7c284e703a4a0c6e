"""Networks that torchvision lacks."""

import torch.nn.functional as F
from torch import nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.ops import Conv2dNormActivation

# output channels and stride of each depthwise separable unit
UNITS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
# LIMPQ's code repeats the stride of a stage in each of its units; the parameters have the same shapes.
REPEATED_STRIDES = [(channels, 1 if channels == 64 else 2) for channels, _ in UNITS]
# of MobileNetV2's stages, with one inverted residual block each: expansion, output channels, number of blocks, stride
ONE_BLOCK_PER_STAGE = [(1, 16, 1, 1), (6, 24, 1, 2), (6, 32, 1, 2), (6, 64, 1, 2), (6, 96, 1, 1), (6, 160, 1, 2),
                       (6, 320, 1, 1)]
TINY = {"hidden_dim": 192, "mlp_dim": 768, "num_heads": 3}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an identity shortcut; where shapes change, it is strided and padded with zero channels."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x):
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al., arXiv 1512.03385, section 4.2): three groups of `blocks` BasicBlocks with 16, 32 and
    64 channels; 6 * blocks + 2 layers in all."""

    def __init__(self, blocks, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, blocks, 1)
        self.layer2 = self._group(16, 32, blocks, 2)
        self.layer3 = self._group(32, 64, blocks, 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(in_channels, out_channels, blocks, stride):
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(num_classes):
    return CifarResNet(3, num_classes)


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., arXiv 1704.04861, table 1): a strided 3x3 convolution, 13 depthwise separable units, global
    average pooling and a linear classifier."""

    def __init__(self, num_classes, units=UNITS):
        super().__init__()
        self.stem = Conv2dNormActivation(3, 32, 3, 2)
        blocks, channels = [], 32
        for out_channels, stride in units:
            blocks.append(nn.Sequential(*Conv2dNormActivation(channels, channels, 3, stride, groups=channels),
                                        *Conv2dNormActivation(channels, out_channels, 1)))
            channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.features(self.stem(x))
        return self.fc(self.pool(x).flatten(1))


def mobilenetv1(num_classes):
    return MobileNetV1(num_classes)


def mobilenetv1_limpq(num_classes):
    """MobileNetV1 with the strides of LIMPQ's code, for checkpoints that were trained with them."""
    return MobileNetV1(num_classes, REPEATED_STRIDES)


def mobilenet_v2_tiny(num_classes):
    """MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2) with half the channels, and one block in each stage."""
    return MobileNetV2(num_classes, 0.5, ONE_BLOCK_PER_STAGE, dropout=0.0)


def vit_tiny_patch16_224(num_classes, input_size=224):
    """ViT-Ti (Dosovitskiy et al., arXiv 2010.11929; tiny: DeiT, arXiv 2012.12877) with patches of 16x16 pixels and 12 blocks,
    5.7 M weights; images of any multiple of 16 pixels."""
    return _vision_transformer(num_classes, input_size, patch_size=16, num_layers=12, **TINY)


def vit_tiny_patch4_32(num_classes, input_size=32):
    """The same width with patches of 4x4 pixels and 6 blocks, 2.7 M weights, for small images: any multiple of 4 pixels."""
    return _vision_transformer(num_classes, input_size, patch_size=4, num_layers=6, **TINY)


def _vision_transformer(num_classes, input_size, **options):
    model = VisionTransformer(image_size=input_size, num_classes=num_classes, **options)
    nn.init.trunc_normal_(model.class_token, std=0.02)
    return model


OWN_MODELS = {"mobilenetv1": mobilenetv1, "mobilenetv1_limpq": mobilenetv1_limpq, "mobilenet_v2_tiny": mobilenet_v2_tiny,
              "resnet20": resnet20, "vit_tiny_patch4_32": vit_tiny_patch4_32, "vit_tiny_patch16_224": vit_tiny_patch16_224}
SIZED_MODELS = ("vit_tiny_patch4_32", "vit_tiny_patch16_224")  # those that are built for one input size
