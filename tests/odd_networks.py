"""Small networks of the kinds that users have, each with something in it that a toolkit may trip over (see networks.py).

A factory is called as that of any network of one's own: `arch: tests/odd_networks.py:channel_shuffle`.
"""

import math

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

SIZE = 32
ALL = {}


def odd(make):
    """Register a factory."""
    ALL[make.__name__] = make
    return make


class Net(nn.Module):
    """A stem, what is odd about the network, pooling, and a classifier."""

    def __init__(self, classes, middle=None, width=8, stem=None, head=None):
        super().__init__()
        self.stem = stem or block(3, 8, stride=4)
        self.middle = middle or block(8, width)
        self.head = head or nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


def block(entering, leaving, kernel=3, stride=1, norm=nn.BatchNorm2d, **options):
    layers = [nn.Conv2d(entering, leaving, kernel, stride, kernel // 2, bias=norm is None, **options)]
    return nn.Sequential(*layers, *([norm(leaving)] if norm else []), nn.ReLU())


class Through(nn.Module):
    """Modules under given names, and a function of (self, x) that uses them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes.


@odd
def view_after_convolution(num_classes):
    """PyTorch's own tutorial: x.view(-1, n), which activations that lie channels last cannot do."""
    return Through(lambda m, x: m.fc2(F.relu(m.fc1(F.max_pool2d(F.relu(m.conv2(m.pool(F.relu(m.conv1(x))))), 2)
                                                   .view(-1, 16 * 5 * 5)))),
                   conv1=nn.Conv2d(3, 6, 5), pool=nn.MaxPool2d(2), conv2=nn.Conv2d(6, 16, 5), fc1=nn.Linear(400, 20),
                   fc2=nn.Linear(20, num_classes))


@odd
def channel_shuffle(num_classes):
    def shuffle(m, x):
        batch, channels, height, width = x.shape
        x = m.first(x).view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return m.second(m.norm(x))
    return Net(num_classes, Through(shuffle, first=nn.Conv2d(8, 8, 3, padding=1, groups=2), norm=nn.BatchNorm2d(8),
                                    second=nn.Conv2d(8, 8, 3, padding=1, groups=8)))


@odd
def pixel_shuffle(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 32, 1), nn.PixelShuffle(2), nn.BatchNorm2d(8), nn.ReLU(),
                                          nn.Conv2d(8, 8, 3), nn.PixelUnshuffle(2)), width=32)


@odd
def gated_linear_unit(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 16, 3), nn.GLU(1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)))


@odd
def patches_by_unfold(num_classes):
    return Through(lambda m, x: m.head(m.more(F.gelu(m.embed(F.unfold(x, 8, stride=8).transpose(1, 2)))).mean(1)),
                   embed=nn.Linear(192, 16), more=nn.Linear(16, 16), head=nn.Linear(16, num_classes))


@odd
def tokens_by_permute(num_classes):
    """ConvNeXt's way: linear layers over the last dimension, and a scale per channel."""
    def forward(m, x):
        y = m.mlp(m.norm(m.deep(x).permute(0, 2, 3, 1)))
        return x + (m.scale * y).permute(0, 3, 1, 2)
    part = Through(forward, deep=nn.Conv2d(8, 8, 7, padding=3, groups=8), norm=nn.LayerNorm(8),
                   mlp=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    part.scale = nn.Parameter(torch.full((8,), 1e-6))
    return Net(num_classes, part)


@odd
def one_dimension(num_classes):
    """1-D convolutions over the rows of a plot: they stay in full precision."""
    return Through(lambda m, x: m.head(m.more(F.relu(m.second(F.relu(m.first(m.stem(x).flatten(2))))).mean(2))),
                   stem=block(3, 8, stride=2), first=nn.Conv1d(8, 16, 5, padding=2), second=nn.Conv1d(16, 16, 3, groups=4),
                   more=nn.Linear(16, 16),
                   head=nn.Linear(16, num_classes))


@odd
def three_dimensions(num_classes):
    """A 3-D convolution, whose weight cannot lie channels last."""
    return Net(num_classes, Through(lambda m, x: m.more(F.relu(m.deep(x[:, None])).mean(2)),
                                    deep=nn.Conv3d(1, 8, 3, padding=1), more=nn.Conv2d(8, 8, 1)))


@odd
def transposed_convolution(num_classes):
    return Net(num_classes, nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3)))


@odd
def small_unet(num_classes):
    """An encoder and a decoder with skips; classified from what comes out."""
    def forward(m, x):
        first = m.down1(x)
        second = m.down2(F.max_pool2d(first, 2))
        up = F.interpolate(second, scale_factor=2, mode="bilinear", align_corners=False)
        return m.head(m.out(torch.cat([first, up, m.up(second)], 1)).mean((2, 3)))
    return Through(forward, down1=block(3, 8), down2=block(8, 16), up=nn.ConvTranspose2d(16, 8, 2, 2), out=block(32, 8),
                   head=nn.Linear(8, num_classes))


@odd
def stride_two_on_the_image(num_classes):
    """A 1x1 convolution with stride 2 on three channels."""
    return Net(num_classes, stem=nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.BatchNorm2d(8), nn.ReLU()))


@odd
def stride_two_on_five_channels(num_classes):
    return Net(num_classes, nn.Sequential(block(8, 5), nn.Conv2d(5, 8, 1, 2, bias=False), nn.BatchNorm2d(8),
                                          nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1, 3)))


@odd
def paddings(num_classes):
    return Net(num_classes, nn.Sequential(
        nn.Conv2d(8, 8, 3, padding="same", dilation=2), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=(0, 1), padding_mode="reflect"), nn.Conv2d(8, 8, (1, 3), padding="valid"),
        nn.ZeroPad2d(1), nn.Conv2d(8, 8, 4, padding="same", padding_mode="replicate")))


# ---------------------------------------------------------------------------------------------------------------------
# Normalization.


@odd
def group_norm(num_classes):
    return Net(num_classes, block(8, 8, norm=lambda n: nn.GroupNorm(2, n)), stem=block(3, 8, stride=4, norm=None))


@odd
def instance_norm(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
                                          nn.PReLU()))


@odd
def no_norm_no_bias(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU()),
               head=nn.Linear(8, num_classes, bias=False), stem=nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.ReLU()))


@odd
def batch_norm_first(num_classes):
    """Normalized before the first convolution, and with a BatchNorm that learns nothing."""
    return Net(num_classes, nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3)),
               stem=nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 4, 4)))


@odd
def batch_norm_without_statistics(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
                                          nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)))


@odd
def synchronised(num_classes):
    return nn.SyncBatchNorm.convert_sync_batchnorm(Net(num_classes))


@odd
def frozen_batch_norm(num_classes):
    from torchvision.ops import FrozenBatchNorm2d

    return Net(num_classes, block(8, 8, norm=FrozenBatchNorm2d))


@odd
def batch_norm_with_activation(num_classes):
    """A subclass that does more than its parent, as timm has it: not to be folded."""
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return F.silu(super().forward(x))

    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3), Activated(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))


@odd
def norm_over_tokens(num_classes):
    return Through(lambda m, x: m.head(m.norm2(m.fc(m.norm1(m.embed(x).flatten(2)).transpose(1, 2)).transpose(1, 2)).mean(2)),
                   embed=nn.Conv2d(3, 8, 4, 4), norm1=nn.BatchNorm1d(8), fc=nn.Linear(8, 12), norm2=nn.BatchNorm1d(12),
                   head=nn.Linear(12, num_classes))


@odd
def batch_norm_after_linear(num_classes):
    return Through(lambda m, x: m.body(x.flatten(1)), body=nn.Sequential(
        nn.Linear(3 * SIZE * SIZE, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 16), nn.BatchNorm1d(16),
        nn.Tanh(), nn.Linear(16, num_classes)))


@odd
def one_batch_norm_after_two_convolutions(num_classes):
    return Net(num_classes, Through(lambda m, x: m.norm(m.first(x)) + m.norm(m.second(x)), first=nn.Conv2d(8, 8, 1),
                                    second=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8)))


@odd
def functional_batch_norm(num_classes):
    """Statistics and weights of a module, used by a function of its own."""
    def forward(m, x):
        norm = m.norm
        return F.batch_norm(m.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, m.training)
    return Net(num_classes, Through(forward, conv=nn.Conv2d(8, 8, 3), norm=nn.BatchNorm2d(8)))


@odd
def asks_its_batch_norm(num_classes):
    """A forward pass that looks at the weight and the type of a BatchNorm it also calls."""
    def forward(m, x):
        x = m.norm(m.conv(x))
        return x * m.norm.weight.view(1, -1, 1, 1) if isinstance(m.norm, nn.BatchNorm2d) else x - m.norm.running_mean.mean()
    return Net(num_classes, Through(forward, conv=nn.Conv2d(8, 8, 3), norm=nn.BatchNorm2d(8)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are computed, shared, or of odd types.


@odd
def weight_norm(num_classes):
    return Net(num_classes, nn.Sequential(parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1)))


@odd
def old_weight_norm(num_classes):
    return Net(num_classes, nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1)))


@odd
def spectral_norm(num_classes):
    return Net(num_classes, nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1)))


@odd
def old_spectral_norm(num_classes):
    return Net(num_classes, nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 1)))


@odd
def orthogonal(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 1), Through(
        lambda m, x: m.turn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]),
        turn=parametrizations.orthogonal(nn.Linear(8, 8)))))


@odd
def standardized_weight(num_classes):
    """A convolution whose forward pass is its own."""
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight
            weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
            return self._conv_forward(x, weight, self.bias)

    return Net(num_classes, nn.Sequential(Standardized(8, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)))


@odd
def plain_subclasses(num_classes):
    """Subclasses that only build differently; the classifier too."""
    class Conv(nn.Conv2d):
        def __init__(self, entering, leaving):
            super().__init__(entering, leaving, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.weight)

    class Classifier(nn.Linear):
        def reset_parameters(self):
            nn.init.trunc_normal_(self.weight, std=0.02)
            nn.init.zeros_(self.bias)

    return Net(num_classes, nn.Sequential(Conv(8, 8), nn.BatchNorm2d(8), nn.ReLU()), head=Classifier(8, num_classes))


@odd
def scaled_linear(num_classes):
    """A classifier that multiplies what its parent answers."""
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return Net(num_classes, nn.Sequential(block(8, 8), block(8, 8)), head=Scaled(8, num_classes))


@odd
def cosine_classifier(num_classes):
    class Cosine(nn.Linear):
        def forward(self, x):
            return 8 * F.linear(F.normalize(x), F.normalize(self.weight))

    return Net(num_classes, nn.Sequential(block(8, 8), block(8, 8)), head=Cosine(8, num_classes, bias=False))


@odd
def one_module_twice(num_classes):
    """A layer and its BatchNorm that are called three times."""
    return Net(num_classes, Through(lambda m, x: m.part(m.part(m.part(x))), part=block(8, 8)))


@odd
def tied_weights(num_classes):
    part = Through(lambda m, x: F.relu(m.second(F.relu(m.first(x)))), first=nn.Conv2d(8, 8, 1), second=nn.Conv2d(8, 8, 1))
    part.second.weight = part.first.weight
    return Net(num_classes, part)


@odd
def siamese(num_classes):
    """Two halves of the image, one encoder, and their difference."""
    return Through(lambda m, x: m.head(torch.abs(m.encoder(x[..., :16]) - m.encoder(x[..., 16:])).mean((2, 3))),
                   encoder=nn.Sequential(block(3, 8, stride=2), block(8, 8)), head=nn.Linear(8, num_classes))


@odd
def buffers_of_odd_types(num_classes):
    net = Net(num_classes, Through(lambda m, x: m.conv(x) * m.mask + m.count, conv=nn.Conv2d(8, 8, 3, padding=1)))
    net.middle.register_buffer("mask", torch.arange(8).view(1, 8, 1, 1) != 3)
    net.middle.register_buffer("count", torch.tensor(3, dtype=torch.int16))
    net.middle.register_buffer("narrow", torch.ones(2, 2, dtype=torch.bfloat16))
    net.middle.register_buffer("wave", torch.ones(2, 2, dtype=torch.complex64))
    net.middle.register_buffer("scratch", torch.ones(3), persistent=False)
    return net


@odd
def position_table(num_classes):
    """A 4-D parameter that is no layer's, not contiguous."""
    net = Net(num_classes, Through(lambda m, x: m.conv(x + m.table), conv=nn.Conv2d(8, 8, 3)))
    net.middle.table = nn.Parameter(torch.randn(8, 8, 1, 8).permute(2, 3, 0, 1) * 0.02)
    return net


@odd
def half_precision(num_classes):
    return Net(num_classes).to(torch.bfloat16)


@odd
def double_precision(num_classes):
    return Through(lambda m, x: m.net(x.double()), net=Net(num_classes).double())


@odd
def lazy(num_classes):
    """Layers that learn their sizes from the first batch."""
    return Net(num_classes, nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()),
               head=nn.LazyLinear(num_classes))


@odd
def pruned_by_torch(num_classes):
    net = Net(num_classes)
    nn.utils.prune.l1_unstructured(net.middle[0], "weight", 0.5)
    return net


@odd
def frozen_stem(num_classes):
    net = Net(num_classes, nn.Sequential(block(8, 8), block(8, 8)))
    net.stem.requires_grad_(False)
    net.middle[0].requires_grad_(False)
    return net


@odd
def blurred(num_classes):
    """A fixed filter, as for pooling without aliasing."""
    net = Net(num_classes, Through(lambda m, x: m.part(F.conv2d(x, m.filter, stride=2, groups=8)), part=block(8, 8)))
    net.middle.register_buffer("filter", (torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16)
                               .expand(8, 1, 3, 3).contiguous())
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of layers.


@odd
def rows_through_lstm(num_classes):
    return Through(lambda m, x: m.head(m.lstm(m.body(x).mean(2).transpose(1, 2))[0][:, -1]),
                   body=nn.Sequential(block(3, 8, stride=2), block(8, 8)),
                   lstm=nn.LSTM(8, 12, batch_first=True, bidirectional=True), head=nn.Linear(24, num_classes))


@odd
def rows_through_gru(num_classes):
    def forward(m, x):
        state = x.new_zeros(len(x), 8)
        for row in m.body(x).mean(3).unbind(2):
            state = m.cell(row, state)
        return m.head(state)
    return Through(forward, body=nn.Sequential(block(3, 8, stride=4), block(8, 8)), cell=nn.GRUCell(8, 8),
                   head=nn.Linear(8, num_classes))


@odd
def embedding_of_places(num_classes):
    def forward(m, x):
        tokens = m.embed(x).flatten(2).transpose(1, 2)
        return m.head(m.mlp(tokens + m.place(torch.arange(tokens.shape[1], device=x.device))).mean(1))
    return Through(forward, embed=nn.Conv2d(3, 8, 8, 8), place=nn.Embedding(16, 8),
                   mlp=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), head=nn.Linear(8, num_classes))


@odd
def bilinear(num_classes):
    return Through(lambda m, x: m.head(m.both(m.left(x).mean((2, 3)), m.right(x).mean((2, 3)))), left=block(3, 6, stride=2),
                   right=block(3, 6, stride=2), both=nn.Bilinear(6, 6, 8), head=nn.Linear(8, num_classes))


@odd
def convolution_as_classifier(num_classes):
    return nn.Sequential(block(3, 8, stride=2), block(8, 8), nn.Conv2d(8, num_classes, 1),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())


@odd
def two_classifiers(num_classes):
    """The mean of two heads, as of a distilled transformer."""
    return Through(lambda m, x: (lambda y: (m.one(y) + m.two(y)) / 2)(m.body(x).mean((2, 3))), body=nn.Sequential(
        block(3, 8, stride=2), block(8, 8)), one=nn.Linear(8, num_classes), two=nn.Linear(8, num_classes))


@odd
def mixture_of_experts(num_classes):
    """Experts that only some images reach."""
    def forward(m, x):
        x = m.stem(x).mean((2, 3))
        chosen, y = m.gate(x).argmax(1), torch.zeros_like(x)
        for index, expert in enumerate(m.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                y = y.index_copy(0, rows, expert(x[rows]))
        return m.head(x + y)
    return Through(forward, stem=block(3, 8, stride=2), gate=nn.Linear(8, 2), head=nn.Linear(8, num_classes),
                   experts=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))


@odd
def squeeze_and_excite(num_classes):
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Hardsigmoid())
    return Net(num_classes, Through(lambda m, x: x * m.gate(x), gate=gate))


@odd
def learned_kernel(num_classes):
    """A parameter used by F.conv2d, and one by a matrix product."""
    net = Net(num_classes, Through(lambda m, x: torch.einsum("bchw,cd->bdhw", F.conv2d(x, m.kernel, padding=1), m.mix)))
    net.middle.kernel, net.middle.mix = nn.Parameter(torch.randn(8, 8, 3, 3) / 9), nn.Parameter(torch.eye(8))
    return net


@odd
def kernels_from_the_data(num_classes):
    """Each image is convolved with kernels that a layer makes from it."""
    def forward(m, x):
        kernels = m.make(x.mean((2, 3))).view(-1, 1, 3, 3)
        return F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(kernels)).unflatten(1, (len(x), -1)).squeeze(0)
    return Net(num_classes, Through(forward, make=nn.Linear(8, 72)))


@odd
def fourier(num_classes):
    """Complex numbers in the middle."""
    part = Through(lambda m, x: m.conv(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.filter), s=x.shape[-2:])),
                   conv=nn.Conv2d(8, 8, 1))
    part.filter = nn.Parameter(torch.randn(8, 8, 5, 2) * 0.1)
    return Net(num_classes, part)


@odd
def deformable(num_classes):
    from torchvision.ops import DeformConv2d

    return Net(num_classes, Through(lambda m, x: m.deform(x, m.offset(x)), offset=nn.Conv2d(8, 18, 3, padding=1),
                                    deform=DeformConv2d(8, 8, 3, padding=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Attention.


def transformer(num_classes, part, width=16):
    """`part` over the tokens of an image, behind a token for the class."""
    def forward(m, x):
        x = m.embed(x).flatten(2).transpose(1, 2)
        return m.head(m.part(torch.cat([m.cls.expand(len(x), -1, -1), x], 1) + m.pos)[:, 0])
    net = Through(forward, embed=nn.Conv2d(3, width, 8, 8), part=part, head=nn.Linear(width, num_classes))
    net.cls, net.pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 17, width) * 0.02)
    return net


@odd
def torch_transformer(num_classes):
    return transformer(num_classes, nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True), 2, enable_nested_tensor=False))


@odd
def transformer_decoder(num_classes):
    """Attention between two inputs."""
    part = Through(lambda m, x: m.layer(x, x[:, 1:]), layer=nn.TransformerDecoderLayer(16, 2, 32, 0.1, batch_first=True))
    return transformer(num_classes, part)


@odd
def attention_by_hand(num_classes):
    def forward(m, x):
        query, key, value = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in (m.q(x), m.k(x), m.v(x)))
        return x + m.out(((query @ key.transpose(2, 3) / math.sqrt(8)).softmax(-1) @ value).transpose(1, 2).flatten(2))
    return transformer(num_classes, Through(forward, **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "out")}))


@odd
def attention_with_weights_by_einsum(num_classes):
    part = Through(lambda m, x: x + torch.einsum("bnd,de->bne", (torch.einsum("bnd,de->bne", x, m.qk) @ x.transpose(1, 2))
                                                 .softmax(-1) @ x, m.vo), mlp=nn.Linear(16, 16))
    part.qk, part.vo = nn.Parameter(torch.randn(16, 16) * 0.1), nn.Parameter(torch.randn(16, 16) * 0.1)
    return transformer(num_classes, nn.Sequential(part, nn.Linear(16, 16)))


@odd
def attention_of_another_width(num_classes):
    part = Through(lambda m, x: x + m.attention(x, m.narrow(x), m.narrow(x))[0], narrow=nn.Linear(16, 8),
                   attention=nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True))
    return transformer(num_classes, part)


# ---------------------------------------------------------------------------------------------------------------------
# What a forward pass does besides.


@odd
def changes_its_images(num_classes):
    """Normalizes its input in place."""
    net = Through(lambda m, x: m.net(x.sub_(0.5).div_(0.25)), net=Net(num_classes))
    return net


@odd
def mixes_its_images(num_classes):
    """Augmentation inside of the network, in training only."""
    return Through(lambda m, x: m.net(x + 0.1 * torch.randn_like(x) if m.training else x), net=Net(num_classes))


@odd
def dropout_before_the_stem(num_classes):
    return Net(num_classes, stem=nn.Sequential(nn.Dropout(0.1), nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(True)))


@odd
def stochastic_depth(num_classes):
    from torchvision.ops import StochasticDepth

    return Net(num_classes, nn.Sequential(*(Through(lambda m, x: x + m.drop(m.part(x)), part=block(8, 8),
                                                    drop=StochasticDepth(0.5, mode)) for mode in ("row", "batch"))))


@odd
def drops_layers(num_classes):
    """Leaves a block out at random in training."""
    return Net(num_classes, Through(lambda m, x: x if m.training and torch.rand(()) < 0.5 else m.part(x), part=block(8, 8)))


@odd
def decides_by_values(num_classes):
    return Net(num_classes, Through(lambda m, x: m.one(x) if x.mean() > -1 else m.two(x), one=block(8, 8), two=block(8, 8)))


@odd
def asks_whether_it_trains(num_classes):
    """Another layer in training than in evaluation."""
    return Net(num_classes, Through(lambda m, x: m.one(x) if m.training else m.two(x), one=block(8, 8), two=block(8, 8)))


@odd
def checkpointing(num_classes):
    """Computes a part anew in the backward pass."""
    return Net(num_classes, Through(lambda m, x: checkpoint(m.part, x, use_reentrant=False), part=nn.Sequential(
        block(8, 8), block(8, 8))))


@odd
def checkpointing_reentrant(num_classes):
    return Net(num_classes, Through(lambda m, x: checkpoint(m.part, x, use_reentrant=True), part=block(8, 8)))


@odd
def autocast_inside(num_classes):
    def forward(m, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            x = m.part(x)
        return x.float()
    return Net(num_classes, Through(forward, part=nn.Sequential(block(8, 8), block(8, 8))))


@odd
def scripted(num_classes):
    """A part that torch.jit compiled."""
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3), torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))))


@odd
def scripted_activation(num_classes):
    return Net(num_classes, nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), torch.jit.script(nn.SiLU()),
                                          nn.Conv2d(8, 8, 1)))


@odd
def hooks(num_classes):
    """A hook that halves what a layer answers."""
    net = Net(num_classes)
    net.middle[0].register_forward_hook(lambda module, inputs, output: output / 2)
    return net


@odd
def input_by_keyword(num_classes):
    return Net(num_classes, Through(lambda m, x: m.two(input=m.one(x)), one=nn.Conv2d(8, 8, 3), two=nn.Conv2d(8, 8, 1)))


@odd
def forward_without_hooks(num_classes):
    """A layer that is called by its forward()."""
    return Net(num_classes, Through(lambda m, x: m.two(m.one.forward(x)), one=nn.Conv2d(8, 8, 3), two=nn.Conv2d(8, 8, 1)))


@odd
def never_reached(num_classes):
    net = Net(num_classes)
    net.aux_head, net.module = nn.Linear(8, 5), nn.ModuleDict({"bns": nn.Linear(3, 3)})
    return net


@odd
def counts_its_calls(num_classes):
    """A buffer that each forward pass changes."""
    def forward(m, x):
        m.calls += 1
        m.mean.lerp_(x.detach().mean(), 0.1)
        return m.net(x)
    net = Through(forward, net=Net(num_classes))
    net.register_buffer("calls", torch.tensor(0))
    net.register_buffer("mean", torch.tensor(0.0))
    return net


@odd
def begins_with_its_first_batch(num_classes):
    """A scale that takes its value from the first batch in training."""
    def forward(m, x):
        x = m.conv(x)
        if m.training and not m.is_ready:
            m.scale.data.copy_(1 / (x.detach().std((0, 2, 3), keepdim=True) + 1e-3))
            m.is_ready.fill_(True)
        return F.relu(x * m.scale)
    part = Through(forward, conv=nn.Conv2d(8, 8, 3))
    part.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
    part.register_buffer("is_ready", torch.tensor(False))
    return Net(num_classes, part)


@odd
def divides_by_its_deviation(num_classes):
    """An image of zeros gives no numbers."""
    return Through(lambda m, x: m.net((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)),
                   net=Net(num_classes))


@odd
def features_without_gradient(num_classes):
    def forward(m, x):
        with torch.no_grad():
            x = m.features(x)
        return m.head(F.relu(m.fc(x.mean((2, 3)))))
    return Through(forward, features=nn.Sequential(block(3, 8, stride=2), block(8, 8)), fc=nn.Linear(8, 8),
                   head=nn.Linear(8, num_classes))


@odd
def teacher_inside(num_classes):
    """A slow copy of the encoder, which follows it in training and is part of the answer."""
    def forward(m, x):
        if m.training:
            with torch.no_grad():
                for slow, fast in zip(m.slow.parameters(), m.fast.parameters(), strict=False):
                    slow.lerp_(fast.detach().reshape(-1)[:slow.numel()].view_as(slow), 0.01)
        return m.head((m.fast(x) + m.slow(x)).mean((2, 3)))
    net = Through(forward, fast=nn.Sequential(block(3, 8, stride=2), block(8, 8)),
                  slow=nn.Sequential(block(3, 8, stride=2), block(8, 8)), head=nn.Linear(8, num_classes))
    net.slow.requires_grad_(False)
    return net


@odd
def delegates_attributes(num_classes):
    """A wrapper that hands what it does not know to what it wraps."""
    class Wrapper(Through):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("net"), name)

    return Wrapper(lambda m, x: m.head(m.middle(m.stem(x)).mean((2, 3))), net=Net(num_classes))


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


@odd
def tuple_in_training(num_classes):
    """The logits and those of an auxiliary head; in evaluation the logits alone."""
    def forward(m, x):
        y = m.body(x).mean((2, 3))
        return (m.head(y), m.aux(y)) if m.training else m.head(y)
    return Through(forward, body=nn.Sequential(block(3, 8, stride=2), block(8, 8)), head=nn.Linear(8, num_classes),
                   aux=nn.Linear(8, num_classes))


@odd
def dict_as_answer(num_classes):
    return Through(lambda m, x: {"out": m.net(x)}, net=Net(num_classes))


@odd
def tuple_as_answer(num_classes):
    return Through(lambda m, x: (m.net(x), x), net=Net(num_classes))


@odd
def map_as_answer(num_classes):
    return nn.Sequential(block(3, 8, stride=2), nn.Conv2d(8, num_classes, 1))


@odd
def probabilities_as_answer(num_classes):
    return Through(lambda m, x: m.net(x).log_softmax(1), net=Net(num_classes))


# ---------------------------------------------------------------------------------------------------------------------
# Names.


@odd
def parallel(num_classes):
    return nn.DataParallel(Net(num_classes))


@odd
def odd_names(num_classes):
    """Attributes named like what wrappers, BatchNorm copies and quantizers are named."""
    return Through(lambda m, x: m.head(m.aux_stem(m.bns[1](m.bns[0](m.module(x)))).mean((2, 3))),
                   module=block(3, 8, stride=2), bns=nn.ModuleList([nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]),
                   aux_stem=block(8, 8), head=nn.Linear(8, num_classes))


@odd
def names_for_yaml(num_classes):
    """Names that a file of settings could take for something else."""
    names = ("1e3", "true", "a: b #c", "größe", "null", "- x", "010")
    return nn.Sequential(block(3, 8, stride=2), nn.Sequential(*(block(8, 8) for _ in "ab")), Through(
        lambda m, x: nn.Sequential(*m.layers.values())(x), layers=nn.ModuleDict({name: nn.Conv2d(8, 8, 1) for name in names})),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


@odd
def one_layer(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, num_classes))


@odd
def two_layers(num_classes):
    """The first and the last: none is left to be searched."""
    return nn.Sequential(block(3, 8, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


@odd
def two_names(num_classes):
    """One module under two names."""
    net = Net(num_classes)
    net.again = net.middle
    return net


@odd
def zero_branch(num_classes):
    """A branch whose input begins at zero."""
    part = Through(lambda m, x: x + m.two(m.gain * m.one(x)), one=nn.Conv2d(8, 8, 1), two=nn.Conv2d(8, 8, 1))
    part.gain = nn.Parameter(torch.zeros(1))
    return Net(num_classes, part)
