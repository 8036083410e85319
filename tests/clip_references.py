"""OpenAI's CLIP in torch, written from the paper (Radford et al. 2021) with the names of its published files."""

import math
from collections import OrderedDict

import torch
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, length=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = ("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.causal = None if length is None else torch.triu(torch.full((length, length), -math.inf), 1)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.causal)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, depth, heads, length=None):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, length) for _ in range(depth)))

    def forward(self, x):
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, size, patch, width, depth, heads, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """The stride is an average in front of the last convolution and of the shortcut's."""

    def __init__(self, inner, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.avgpool, self.downsample = nn.AvgPool2d(stride), None
        if stride > 1 or inner != 4 * width:
            conv = nn.Conv2d(inner, 4 * width, 1, bias=False)
            layers = ("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(4 * width))
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.avgpool(torch.relu(self.bn2(self.conv2(y))))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """The mean of the map asks the mean and all cells."""

    def __init__(self, side, width, heads, out):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(side**2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj, self.heads = nn.Linear(width, out), heads

    def forward(self, x):
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding

        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x))
        weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
        return self.c_proj((weights @ value).transpose(1, 2).flatten(2)[:, 0])


class ModifiedResNet(nn.Module):
    def __init__(self, depths, width, heads, size, out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inner = width
        for s, depth in enumerate(depths):
            blocks = []
            for b in range(depth):
                blocks.append(Bottleneck(inner, width * 2**s, 2 if s and not b else 1))
                inner = 4 * width * 2**s
            setattr(self, f"layer{s + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(size // 32, inner, heads, out)

    def forward(self, x):
        for i in (1, 2, 3):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = nn.functional.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    def __init__(self, visual, *, vocab, length, width, depth, heads, out):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(width, depth, heads, length)
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        for name, size in (("context_length", length), ("vocab_size", vocab)):
            self.register_buffer(name, torch.tensor(size))

    def encode_text(self, ids):
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection

    def forward(self, images, ids):
        """Vectors of length one."""
        normed = nn.functional.normalize
        return normed(self.visual(images), dim=1), normed(self.encode_text(ids), dim=1)


def randomised(model):
    """The model with random parameters and running statistics, in evaluation."""
    generator = torch.Generator().manual_seed(0)
    for name, leaf in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if not leaf.is_floating_point():
            continue
        noise = torch.randn(leaf.shape, generator=generator)
        if name == "logit_scale":
            value = leaf.detach().clone()
        elif name.endswith("running_var"):
            value = noise.abs() + 0.5
        elif leaf.ndim > 1 and "embedding" not in name:
            value = noise / leaf[0].numel() ** 0.5
        else:
            value = 1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise
        leaf.data = value
    return model.eval()
