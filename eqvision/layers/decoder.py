"""The transformer block of text models and the stack of equal blocks: all of T5, and the decoders of captions.

One block for all of them: causal self-attention, attention to a memory where there is one, MLP. Without a mask in time
it is an encoder's. Parameters of equal blocks are stacked and scanned, as in ``transformer.py``, which is for images.
"""

import functools
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from eqvision.layers.attention import Attention, Bias, Implementation, KeyMask, Visible
from eqvision.layers.drop import fold
from eqvision.layers.init import xavier_uniform
from eqvision.layers.kv_cache import KVCache, LayerSlots, Memory, empty_cache
from eqvision.layers.linear import Initializer
from eqvision.layers.mlp import MLP, Activation, GatedMLP
from eqvision.layers.norm import LayerNorm, RMSNorm
from eqvision.layers.transformer import NormOrder, Remat, rematerialised

TextNorm = Literal["layer", "rms"]
TextMLP = Literal["plain", "gated"]
KeysValues = tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]  # (b m h e); fewer rows than the decoder has


class DecoderBlock(eqx.Module):
    """Self-attention, cross-attention where ``memory_width`` is given, and MLP, each with a residual and a norm.

    ``norm_order`` "pre" normalises the input of each (T5), "post" each sum (BERT, GIT). ``inner_width`` and ``scaled``
    are those of ``Attention``; ``use_bias`` is for all matrices. ``mlp`` "gated" is ``GatedMLP`` with ``activation``.
    """

    norm1: LayerNorm | RMSNorm
    attention: Attention
    norm2: LayerNorm | RMSNorm | None
    cross_attention: Attention | None
    norm3: LayerNorm | RMSNorm
    mlp: MLP | GatedMLP
    norm_order: NormOrder = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        memory_width: int | None = None,
        inner_width: int | None = None,
        scaled: bool = True,
        use_bias: bool = True,
        norm: TextNorm = "layer",
        norm_order: NormOrder = "pre",
        eps: float = 1e-6,
        mlp: TextMLP = "plain",
        activation: Activation = "gelu",
        dropout: float = 0.0,
        implementation: Implementation = "xla",
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        choices = (("norm", norm, TextNorm), ("norm_order", norm_order, NormOrder), ("mlp", mlp, TextMLP))
        for name, given, known in choices:
            if given not in get_args(known):
                raise ValueError(f"{name} {given!r} is unknown; choose from {get_args(known)}")
        build_norm = functools.partial(LayerNorm if norm == "layer" else RMSNorm, width, eps=eps)
        attend = functools.partial(
            Attention,
            width,
            num_heads,
            inner_width=inner_width,
            scaled=scaled,
            use_bias=use_bias,
            dropout=dropout,
            implementation=implementation,
            init=init,
        )
        keys, crosses = jax.random.split(key, 3), memory_width is not None
        self.norm1, self.norm3 = build_norm(), build_norm()
        self.norm2 = build_norm() if crosses else None
        self.attention = attend(key=keys[0])
        self.cross_attention = attend(kv_width=memory_width, key=keys[1]) if crosses else None
        build = MLP if mlp == "plain" else GatedMLP
        options = {"activation": activation, "use_bias": use_bias, "dropout": dropout, "init": init}
        self.mlp = build(width, mlp_dim, **options, key=keys[2])
        self.norm_order = norm_order

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        slots: LayerSlots | None = None,
        memory: KeysValues | None = None,
        memory_mask: Bool[Array, "_ _"] | None = None,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        visible: Visible | None = None,
        causal: bool = False,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b n d"], LayerSlots | None]:
        """With ``slots``, keys and values are written there, and all that are there are read; ``visible`` says which.

        ``memory`` is what ``remembered`` gives.
        """
        y = self.norm1(x) if self.norm_order == "pre" else x
        flat, batch = y.reshape(-1, y.shape[-1]), y.shape[0]
        queries = self.attention.queries(flat, batch)
        keys, values = self.attention.keys_values(flat, flat, batch)
        if slots is not None:
            slots = slots.write(keys, values)
            keys, values = slots.read()
        seen = {"bias": bias, "key_mask": key_mask, "visible": visible, "causal": causal}
        x = x + self.attention.mixed(queries, keys, values, **seen, train=train, key=fold(key, 0))
        x = x if self.norm_order == "pre" else self.norm1(x)
        if memory is not None:
            x = self._across(x, memory, memory_mask, train=train, key=fold(key, 1))
        y = self.norm3(x) if self.norm_order == "pre" else x
        x = x + self.mlp(y, train=train, key=fold(key, 2))
        return (x if self.norm_order == "pre" else self.norm3(x)), slots

    def remembered(self, memory: Float[Array, "b m e"], mask: Bool[Array, "b m"] | None) -> KeysValues:
        """Keys and values of the memory, in which padding may be anything."""
        if self.cross_attention is None:
            raise ValueError("DecoderBlock: built without memory_width, so it cannot attend to a memory")
        memory = memory if mask is None else jnp.where(mask[:, :, None], memory, 0)
        flat = memory.reshape(-1, memory.shape[-1])
        return self.cross_attention.keys_values(flat, flat, memory.shape[0])

    def _across(self, x, memory, memory_mask, *, train, key):
        """Rows that share a memory, as beams do, are one long row of queries: no order counts here."""
        assert self.cross_attention is not None
        assert self.norm2 is not None
        y = self.norm2(x) if self.norm_order == "pre" else x
        rows = memory[0].shape[0]
        queries = self.cross_attention.queries(y.reshape(-1, y.shape[-1]), rows)
        visible = None if memory_mask is None else memory_mask[:, None]
        mixed = self.cross_attention.mixed(queries, *memory, visible=visible, train=train, key=key)
        x = x + mixed.reshape(x.shape)
        return x if self.norm_order == "pre" else self.norm2(x)


class DecoderStack(eqx.Module):
    """``depth`` equal blocks with stacked parameters, run by ``lax.scan``; options as in ``DecoderBlock``.

    ``remat`` and ``unroll`` as in ``TransformerStack``.
    """

    blocks: DecoderBlock
    depth: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        *,
        memory_width: int | None = None,
        inner_width: int | None = None,
        scaled: bool = True,
        use_bias: bool = True,
        norm: TextNorm = "layer",
        norm_order: NormOrder = "pre",
        eps: float = 1e-6,
        mlp: TextMLP = "plain",
        activation: Activation = "gelu",
        dropout: float = 0.0,
        implementation: Implementation = "xla",
        remat: Remat = "none",
        unroll: int = 1,
        init: Initializer = xavier_uniform,
        key: PRNGKeyArray,
    ):
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r} is unknown; choose from {get_args(Remat)}")

        def block(key: PRNGKeyArray) -> DecoderBlock:
            return DecoderBlock(
                width,
                num_heads,
                mlp_dim,
                memory_width=memory_width,
                inner_width=inner_width,
                scaled=scaled,
                use_bias=use_bias,
                norm=norm,
                norm_order=norm_order,
                eps=eps,
                mlp=mlp,
                activation=activation,
                dropout=dropout,
                implementation=implementation,
                init=init,
                key=key,
            )

        self.blocks = eqx.filter_vmap(block)(jax.random.split(key, depth))
        self.depth = depth
        self.remat = remat
        self.unroll = unroll

    def __call__(
        self,
        x: Float[Array, "b n d"],
        *,
        memory: Float[Array, "b m e"] | None = None,
        memory_mask: Bool[Array, "b m"] | None = None,
        bias: Bias | None = None,
        key_mask: KeyMask | None = None,
        visible: Visible | None = None,
        causal: bool = True,
        train: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        """All tokens at once, without a cache."""
        seen = {"bias": bias, "key_mask": key_mask, "visible": visible, "causal": causal}

        def run(y, block: DecoderBlock, index):
            kept = None if memory is None else block.remembered(memory, memory_mask)
            return block(y, memory=kept, memory_mask=memory_mask, **seen, train=train, key=fold(key, index))[0]

        body = rematerialised(run, self.remat if train else "none")
        layers = (self.blocks, jnp.arange(self.depth))
        return lax.scan(lambda y, layer: (body(y, *layer), None), x, layers, unroll=self.unroll)[0]

    def start(
        self,
        prefix: Float[Array, "b p d"],
        *,
        prefix_mask: Bool[Array, "b p"] | None = None,
        memory: Float[Array, "b m e"] | None = None,
        memory_mask: Bool[Array, "b m"] | None = None,
    ) -> KVCache:
        """A cache that has read the prefix, of which there may be none (p = 0), and the memory; it has no text.

        The vectors of a prefix see each other.
        """
        attention, kept = self.blocks.attention, None
        if memory is not None:
            keys, values = lax.map(lambda block: block.remembered(memory, memory_mask), self.blocks)
            kept = Memory(keys, values, memory_mask)
        mask = jnp.ones(prefix.shape[:2], bool) if prefix_mask is None else prefix_mask
        head_width = attention.query.weight.shape[-1] // attention.num_heads
        cache = empty_cache(self.depth, mask, attention.num_heads, head_width, dtype=prefix.dtype, memory=kept)
        return self._run(prefix, cache, jnp.int32(0), mask[:, None], None)[1] if mask.shape[1] else cache

    def step(
        self, x: Float[Array, "b n d"], cache: KVCache, *, bias: Bias | None = None
    ) -> tuple[Float[Array, "b n d"], KVCache]:
        """The tokens of the slots of text that were taken last; all earlier ones are in the cache.

        ``bias`` is for all slots. Gives NaN where more were taken than there is room for.
        """
        number = x.shape[1]
        start = cache.prefix + cache.length - number
        x, cache = self._run(x, cache, start, cache.visible(number), bias)
        return jnp.where(cache.length <= cache.room, x, jnp.nan), cache

    def _run(
        self, x: Float[Array, "b n d"], cache: KVCache, start: Int[Array, ""], visible: Visible, bias: Bias | None
    ) -> tuple[Float[Array, "b n d"], KVCache]:
        memory = cache.memory
        memory_mask = None if memory is None else memory.mask

        def run(carry, layer):
            y, keys, values = carry
            block, index, kept = layer
            slots = LayerSlots(keys, values, index, start)
            y, slots = block(y, slots=slots, memory=kept, memory_mask=memory_mask, bias=bias, visible=visible)
            return (y, slots.keys, slots.values), None

        kept = None if memory is None else (memory.keys, memory.values)
        layers = (self.blocks, jnp.arange(self.depth), kept)
        (x, keys, values), _ = lax.scan(run, (x, cache.keys, cache.values), layers)
        return x, cache._replace(keys=keys, values=values)
