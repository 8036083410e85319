"""ViT and ResNet v1.5 in Flax Linen, built the way Scenic builds them: stock modules, unrolled layers, NHWC."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.peer_models.specs import JaxModel, ResNetSpec, Spec, ViTSpec

POSITION_INIT = nn.initializers.normal(stddev=0.02)


class MlpBlock(nn.Module):
    """Two dense layers with GELU between them."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        bias_init = nn.initializers.normal(stddev=1e-6)
        x = nn.Dense(self.mlp_dim, kernel_init=nn.initializers.xavier_uniform(), bias_init=bias_init)(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, kernel_init=nn.initializers.xavier_uniform(), bias_init=bias_init)(x)


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer."""

    mlp_dim: int
    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, kernel_init=nn.initializers.xavier_uniform(), deterministic=True
        )
        x = x + attention(y, y)
        return x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x))


class ViT(nn.Module):
    """Vision Transformer with a class token, learned positions and a zero-initialised classifier."""

    spec: ViTSpec

    @nn.compact
    def __call__(self, images):
        spec, patch = self.spec, (self.spec.patch, self.spec.patch)
        x = nn.Conv(spec.width, patch, strides=patch, padding="VALID", name="embedding")(images)
        x = x.reshape(x.shape[0], -1, spec.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, spec.width))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("posembed_input", POSITION_INIT, (1, x.shape[1], spec.width))
        for index in range(spec.depth):
            x = EncoderBlock(spec.mlp_dim, spec.heads, name=f"encoderblock_{index}")(x)
        x = nn.LayerNorm(name="encoder_norm")(x)[:, 0]
        return nn.Dense(spec.num_classes, kernel_init=nn.initializers.zeros, name="output_projection")(x)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 with a projected shortcut where the shape changes."""

    features: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9, epsilon=1e-5)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), strides, padding=((1, 1), (1, 1)))(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.features, (1, 1), strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet v1.5 with global average pooling."""

    spec: ResNetSpec

    @nn.compact
    def __call__(self, images, train: bool):
        spec = self.spec
        x = nn.Conv(spec.width, (7, 7), (2, 2), padding=((3, 3), (3, 3)), use_bias=False, name="conv_init")(images)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(spec.depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                x = Bottleneck(spec.width * 2**stage, stride, train)(x)
        return nn.Dense(spec.num_classes, name="head")(x.mean(axis=(1, 2)))


def vit(spec: ViTSpec, key) -> JaxModel:
    """The transformer; its state is empty."""
    module = ViT(spec)
    images = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    params = jax.jit(module.init)(key, images)["params"]

    def evaluate(params, state, images):
        return module.apply({"params": params}, images)

    def train(params, state, images):
        return evaluate(params, state, images), state

    return JaxModel(params, {}, evaluate, train)


def resnet(spec: ResNetSpec, key) -> JaxModel:
    """The convolutional network; its state holds the running statistics."""
    module = ResNet(spec)
    images = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    variables = jax.jit(partial(module.init, train=False))(key, images)

    def evaluate(params, state, images):
        return module.apply({"params": params, "batch_stats": state}, images, train=False)

    def train(params, state, images):
        variables = {"params": params, "batch_stats": state}
        logits, updates = module.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    return JaxModel(variables["params"], variables["batch_stats"], evaluate, train)


def build(spec: Spec, key) -> JaxModel:
    """The Flax contestant for one network."""
    return vit(spec, key) if isinstance(spec, ViTSpec) else resnet(spec, key)
