"""ViT and ResNet v1.5 from stock ``eqx.nn`` modules: one image per call, ``jax.vmap`` outside, unrolled layers."""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.peer_models.specs import JaxModel, ResNetSpec, Spec, ViTSpec

AXIS = "batch"


class EncoderBlock(eqx.Module):
    """Pre-norm transformer layer on tokens ``(n, d)``."""

    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, width, heads, mlp_dim, key):
        key1, key2 = jax.random.split(key)
        bias = {"use_query_bias": True, "use_key_bias": True, "use_value_bias": True, "use_output_bias": True}
        self.norm1 = eqx.nn.LayerNorm(width, eps=1e-6)
        self.attention = eqx.nn.MultiheadAttention(heads, width, **bias, key=key1)
        self.norm2 = eqx.nn.LayerNorm(width, eps=1e-6)
        self.mlp = eqx.nn.MLP(width, width, mlp_dim, depth=1, activation=exact_gelu, key=key2)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class ViT(eqx.Module):
    """Vision Transformer with a class token and learned positions, image ``(3, h, w)`` to logits."""

    embedding: eqx.nn.Conv2d
    cls: jax.Array
    positions: jax.Array
    blocks: list[EncoderBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, spec: ViTSpec, key):
        keys = jax.random.split(key, spec.depth + 3)
        tokens = (spec.image_size // spec.patch) ** 2 + 1
        self.embedding = eqx.nn.Conv2d(3, spec.width, spec.patch, spec.patch, key=keys[0])
        self.cls = jnp.zeros((1, spec.width))
        self.positions = 0.02 * jax.random.normal(keys[1], (tokens, spec.width))
        self.blocks = [EncoderBlock(spec.width, spec.heads, spec.mlp_dim, key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(spec.width, eps=1e-6)
        self.head = eqx.nn.Linear(spec.width, spec.num_classes, key=keys[2])

    def __call__(self, image):
        x = self.embedding(image)
        x = x.reshape(x.shape[0], -1).T
        x = jnp.concatenate([self.cls, x]) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[0]))


class Bottleneck(eqx.Module):
    """1x1, 3x3 (strided), 1x1 with a projected shortcut where the shape changes."""

    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    shortcut: tuple[eqx.nn.Conv2d, eqx.nn.BatchNorm] | None

    def __init__(self, inputs, features, stride, key):
        keys, outputs = jax.random.split(key, 4), 4 * features
        self.convs = [
            eqx.nn.Conv2d(inputs, features, 1, use_bias=False, key=keys[0]),
            eqx.nn.Conv2d(features, features, 3, stride, padding=1, use_bias=False, key=keys[1]),
            eqx.nn.Conv2d(features, outputs, 1, use_bias=False, key=keys[2]),
        ]
        self.norms = [batch_norm(features), batch_norm(features), batch_norm(outputs)]
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            conv = eqx.nn.Conv2d(inputs, outputs, 1, stride, use_bias=False, key=keys[3])
            self.shortcut = (conv, batch_norm(outputs))

    def __call__(self, x, state):
        y, state = self.norms[0](self.convs[0](x), state)
        y, state = self.norms[1](self.convs[1](jax.nn.relu(y)), state)
        y, state = self.norms[2](self.convs[2](jax.nn.relu(y)), state)
        if self.shortcut is not None:
            conv, norm = self.shortcut
            x, state = norm(conv(x), state)
        return jax.nn.relu(x + y), state


class ResNet(eqx.Module):
    """ResNet v1.5 with global average pooling, image ``(3, h, w)`` to logits."""

    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    pool: eqx.nn.MaxPool2d
    blocks: list[Bottleneck]
    head: eqx.nn.Linear

    def __init__(self, spec: ResNetSpec, key):
        stem_key, head_key, *keys = jax.random.split(key, sum(spec.depths) + 2)
        self.stem = eqx.nn.Conv2d(3, spec.width, 7, 2, padding=3, use_bias=False, key=stem_key)
        self.norm = batch_norm(spec.width)
        self.pool = eqx.nn.MaxPool2d(3, 2, padding=1)
        self.blocks, inputs = [], spec.width
        for stage, depth in enumerate(spec.depths):
            for index in range(depth):
                features, stride = spec.width * 2**stage, 2 if stage > 0 and index == 0 else 1
                self.blocks.append(Bottleneck(inputs, features, stride, keys[len(self.blocks)]))
                inputs = 4 * features
        self.head = eqx.nn.Linear(inputs, spec.num_classes, key=head_key)

    def __call__(self, image, state):
        x, state = self.norm(self.stem(image), state)
        x = self.pool(jax.nn.relu(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean(axis=(1, 2))), state


def exact_gelu(x):
    """The erf form."""
    return jax.nn.gelu(x, approximate=False)


def batch_norm(features):
    """Batch norm as the library documents it for training on raw batch statistics."""
    return eqx.nn.BatchNorm(features, axis_name=AXIS, eps=1e-5, momentum=0.9, mode="batch")


def vit(spec: ViTSpec, key) -> JaxModel:
    """The transformer; its state is empty."""
    arrays, static = eqx.partition(ViT(spec, key), eqx.is_array)

    def evaluate(params, state, images):
        return jax.vmap(eqx.combine(params, static))(images)

    def train(params, state, images):
        return evaluate(params, state, images), state

    return JaxModel(arrays, {}, evaluate, train, channels_first=True)


def resnet(spec: ResNetSpec, key) -> JaxModel:
    """The convolutional network; its state holds the running statistics."""
    model, state = eqx.nn.make_with_state(ResNet)(spec, key)
    arrays, static = eqx.partition(model, eqx.is_array)

    def evaluate(params, state, images):
        frozen = eqx.nn.inference_mode(eqx.combine(params, static))
        return jax.vmap(frozen, axis_name=AXIS, in_axes=(0, None))(images, state)[0]

    def train(params, state, images):
        model = eqx.combine(params, static)
        return jax.vmap(model, axis_name=AXIS, in_axes=(0, None), out_axes=(0, None))(images, state)

    return JaxModel(arrays, state, evaluate, train, channels_first=True)


def build(spec: Spec, key) -> JaxModel:
    """The stock Equinox contestant for one network."""
    return vit(spec, key) if isinstance(spec, ViTSpec) else resnet(spec, key)
