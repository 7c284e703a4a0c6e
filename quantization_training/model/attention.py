"""Attention decomposed into layers, so that its projections are found, counted and quantized.

torch's nn.MultiheadAttention and torchvision's window attention of Swin hand the weights of their projections to one
function. Here query, key and value come from one linear layer, as one matrix [3 * dim, dim], the output from another, and
the result is the same.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from .names import put_modules

SEPARATED = -100.0  # what Swin adds to the scores of tokens that only the cyclic shift brought together


def decompose_attention(model):
    """Replace every attention module whose projections are hidden, in place; return the network.

    What cannot be decomposed stays as it is, and trace() reports its matrices as uncounted: subclasses of
    nn.MultiheadAttention, and those with keys or values of another width, extra tokens, hooks, or computed weights.
    """
    replacements = {}
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and name and _is_plain(module):
            replacements[name] = SelfAttention(module)
        elif type(module) in WINDOW_ATTENTIONS:
            module.__class__ = WINDOW_ATTENTIONS[type(module)]  # the same tensors, under the same names
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # without gradients these two hand all weights to one function, which
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # would leave the quantizers out
    put_modules(model, replacements)
    return model


def _is_plain(attention):
    return (attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
            and isinstance(attention.in_proj_weight, nn.Parameter)
            and not attention._forward_hooks and not attention._forward_pre_hooks)


def name_of_projection(own, name):
    """The name, among a network's own, of a tensor of attention's projections that torch calls `name`; any other stays."""
    ours = re.sub("in_proj_(weight|bias)$", r"in_proj.\1", name)
    return ours if ours in own else name


class SelfAttention(nn.Module):
    """nn.MultiheadAttention whose projections are the linear layers in_proj [3 * dim, dim] and out_proj [dim, dim].

    It is called like `original`, whose parameters it takes over. Where query, key and value are different inputs, in_proj is
    applied as parts of the matrix, not as the layer.
    """

    # torch's transformer layers ask for these.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, original):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = original.embed_dim, original.num_heads, original.head_dim
        self.dropout, self.batch_first = original.dropout, original.batch_first
        self.in_proj = _linear(original.in_proj_weight, original.in_proj_bias)
        self.out_proj = _linear(original.out_proj.weight, original.out_proj.bias)
        self.train(original.training)

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        """Attention of query [batch, L, dim] on key and value [batch, S, dim]; [L, batch, dim] without batch_first, or
        without the batch. Masks and the result (output, weights or None) are those of nn.MultiheadAttention."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        is_batched = query.dim() == 3
        query, key, value = (self._split(part, is_batched) for part in self._project(query, key, value))
        mask = self._merged_mask(attn_mask, key_padding_mask, query)
        if need_weights:  # arXiv 1706.03762, eq. 1
            scores = query / math.sqrt(self.head_dim) @ key.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            out = weights @ value
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            dropout = self.dropout if self.training else 0.0
            out, weights = F.scaled_dot_product_attention(query, key, value, mask, dropout), None
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not is_batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query, key, value):
        if attends_to_itself(query, key, value):
            return self.in_proj(query).chunk(3, dim=-1)
        bias = self.in_proj.bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(*each) for each in zip((query, key, value), self.in_proj.weight.chunk(3), biases, strict=True)]

    def _split(self, x, is_batched):
        """[batch, heads, tokens, head_dim]"""
        if not is_batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merged_mask(self, attn_mask, key_padding_mask, query):
        """What is added to the scores [batch, heads, L, S], or None. A boolean mask is True where attention is banned."""
        masks = []
        if attn_mask is not None:  # [L, S] or [batch * heads, L, S]
            masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:  # [batch, S] or [S]
            masks.append(key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1]))
        masks = [mask if mask.is_floating_point() else
                 torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf) for mask in masks]
        return sum(masks[1:], start=masks[0]) if masks else None


def attends_to_itself(query, key, value):
    """Whether one projection of one input gives all three."""
    return query is key and key is value


def _linear(weight, bias):
    """A linear layer of existing parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


class _Windowed:
    """Self-attention inside windows, which every other block shifts (Swin, arXiv 2103.14030, section 3.2)."""

    def forward(self, x):
        """Of x [batch, height, width, dim], the same shape. Sides that the window does not divide are padded with zeros."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        sides = x.shape[1:3]
        shift = [0 if window >= side else shift
                 for side, window, shift in zip(sides, self.window_size, self.shift_size, strict=True)]
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            # Within a window, rows and columns that came round from the other end are no neighbours of the others.
            rows, columns = (torch.arange(side, device=x.device) >= side - step
                             for side, step in zip(sides, shift, strict=True))
            regions = into_windows((2 * rows[:, None] + columns)[None, :, :, None], self.window_size).squeeze(-1)
            mask = (regions[:, :, None] != regions[:, None, :]) * x.new_tensor(SEPARATED)
        x = out_of_windows(self._attend(into_windows(x, self.window_size), mask), self.window_size, sides)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :height, :width].contiguous()

    def _attend(self, x, mask):
        """Self-attention of x [batch * windows, tokens, dim]; mask: [windows, tokens, tokens] to add to scores, or None."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self._scores(query, key) + self.get_relative_position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        x = self.proj((weights @ value).transpose(1, 2).flatten(2))
        return F.dropout(x, self.dropout, self.training)


class WindowAttention(_Windowed, ShiftedWindowAttention):
    """torchvision's ShiftedWindowAttention, with qkv and proj called as layers."""

    def _scores(self, query, key):
        return query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)


class WindowAttentionV2(_Windowed, ShiftedWindowAttentionV2):
    """torchvision's ShiftedWindowAttentionV2, with qkv and proj called as layers (arXiv 2111.09883, section 3.3)."""

    def _scores(self, query, key):
        if self.qkv.bias is not None:  # keys have none, whatever stands in their part of it
            key = key - self.qkv.bias.chunk(3)[1].view(self.num_heads, 1, -1)
            key = key.masked_fill((key == 0).all(-1, keepdim=True), 0)  # padding, whose direction has no finite slope
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=math.log(100)).exp()


WINDOW_ATTENTIONS = {ShiftedWindowAttention: WindowAttention, ShiftedWindowAttentionV2: WindowAttentionV2}


def into_windows(x, window):
    """[batch, height, width, dim] to [batch * windows, tokens, dim]."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def out_of_windows(x, window, sides):
    """[batch * windows, tokens, dim] to [batch, height, width, dim], sides being (height, width)."""
    rows, columns = (side // length for side, length in zip(sides, window, strict=True))
    x = x.unflatten(1, tuple(window)).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
