"""Position tables on other grids: each rule against the library that has it, to 1e-6 of the table's scale."""

import subprocess
import sys

import numpy as np
import pytest

from eqvision.pretrained.resample import (
    dinov2_bicubic,
    relative_bias,
    relative_bias_bicubic,
    scipy_zoom,
    torch_bicubic,
    torch_bicubic_antialias,
)

RULES = [torch_bicubic, torch_bicubic_antialias, dinov2_bicubic, scipy_zoom]
# larger, smaller, one axis each way, one axis only, from and to grids that are not square
GRIDS = [
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((37, 37), (16, 16)),
    ((14, 14), (14, 20)),
    ((7, 9), (3, 31)),
    ((16, 16), (37, 50)),
    ((2, 3), (1, 1)),
]
WINDOWS = [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((7, 8), (8, 12)), ((7, 7), (7, 14)), ((4, 4), (24, 24))]


def random_table(grid, width=6):
    return np.random.default_rng(sum(grid)).normal(size=(*grid, width)).astype(np.float32)


def interpolated(table, **options):
    """torch.nn.functional.interpolate on a table (h, w, d)."""
    import torch

    nchw = torch.tensor(table).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(nchw, **options)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_stays_and_the_type_is_float32(rule, assert_close):
    for old, new in GRIDS:
        result = rule(np.full((*old, 2), 3.0), new)
        assert result.shape == (*new, 2)
        assert result.dtype == np.float32
        # torch's float32 weights sum to one but for rounding
        assert_close(result, np.full((*new, 2), 3.0), 2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_grid_gives_the_same_numbers(rule, assert_close):
    table = random_table((5, 7))
    assert_close(rule(table, (5, 7)), table, 1e-7)


def test_the_rules_differ():
    """A test that takes one for another must be able to fail."""
    table = random_table((14, 14))
    results = [rule(table, (10, 10)) for rule in RULES]
    apart = [np.abs(a - b).max() for i, a in enumerate(results) for b in results[:i]]
    assert min(apart) > 0.01


@pytest.mark.parametrize("rule", [relative_bias, relative_bias_bicubic])
def test_relative_bias_is_a_table_of_offsets(rule, assert_close):
    table = random_table((13, 13), 3)
    assert_close(rule(table, (7, 7)), table, 1e-7)
    assert rule(table, (8, 12)).shape == (15, 23, 3)
    symmetric = table + table[::-1, ::-1]
    wider = rule(symmetric, (12, 12))
    assert_close(wider, wider[::-1, ::-1], 2e-6)
    # the offset of nothing is the middle of the old table and of the new
    assert_close(wider[11, 11], symmetric[6, 6], 2e-6)


def test_relative_bias_keeps_the_outermost_offsets(assert_close):
    table = random_table((13, 13), 3)
    wider = relative_bias(table, (12, 12))
    assert_close(wider[::22, ::22], table[::12, ::12], 1e-4)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, eqvision.pretrained.resample; print([m for m in ('torch', 'scipy.ndimage') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_scipy_zoom_is_google_s(old, new, assert_close):
    """interpolate_posembed of vit_jax/checkpoint.py, resample_posemb of big_vision/models/vit.py, and Scenic's."""
    from scipy.ndimage import zoom

    table = random_table(old)
    expected = zoom(table, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert_close(scipy_zoom(table, new), expected, 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_torch(old, new, assert_close):
    """DeiT's main.py and MAE's util/pos_embed.py call this with align_corners=False."""
    table = random_table(old)
    assert_close(torch_bicubic(table, new), interpolated(table, size=new, mode="bicubic", align_corners=False), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_timm(old, new, assert_close):
    import torch
    from timm.layers.pos_embed import resample_abs_pos_embed

    table = random_table(old)
    tokens = torch.tensor(table.reshape(1, -1, 6))
    expected = resample_abs_pos_embed(tokens, list(new), list(old), num_prefix_tokens=0)
    assert_close(torch_bicubic_antialias(table, new).reshape(1, -1, 6), expected.numpy(), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_dinov2(old, new, assert_close):
    """interpolate_pos_encoding of dinov2/models/vision_transformer.py with its default offset."""
    table = random_table(old)
    steps = tuple(float(n + 0.1) / o for o, n in zip(old, new, strict=True))
    assert_close(dinov2_bicubic(table, new), interpolated(table, scale_factor=steps, mode="bicubic"), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("new", [(24, 24), (5, 9), (14, 20)])
def test_transformers(family, new, assert_close):
    """The embedding modules of transformers, at images of another size."""
    import importlib

    import torch

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    camel = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[family]
    config = getattr(importlib.import_module(f"transformers.models.{family}"), f"{camel}Config")
    sizes = {"hidden_size": 6, "num_attention_heads": 2, "patch_size": 4, "image_size": 56}
    embeddings = getattr(module, f"{camel}Embeddings")(config(**sizes))
    table = random_table((14, 14))
    prefix = embeddings.position_embeddings.shape[1] - 14 * 14
    with torch.no_grad():
        embeddings.position_embeddings[0, prefix:] = torch.tensor(table.reshape(-1, 6))
        # the method counts one class token besides the patches, and two with DeiT's distillation token
        given = torch.zeros(1, prefix + new[0] * new[1], 6)
        result = embeddings.interpolate_pos_encoding(given, 4 * new[0], 4 * new[1])[0, prefix:].numpy()
    rule = torch_bicubic_antialias if "registers" in family else torch_bicubic
    assert_close(rule(table, new), result.reshape(*new, 6), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), WINDOWS)
def test_relative_bias_is_timm_s(old, new, assert_close):
    import torch
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    table = random_table((2 * old[0] - 1, 2 * old[1] - 1), 3)
    rows, columns = 2 * new[0] - 1, 2 * new[1] - 1
    flat = torch.tensor(table.reshape(-1, 3))
    expected = resize_rel_pos_bias_table(flat, new, (rows * columns, 3), old).numpy()
    assert_close(relative_bias(table, new), expected.reshape(rows, columns, 3), 1e-6)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), [pair for pair in WINDOWS if pair[0][0] == pair[0][1]])
def test_relative_bias_bicubic_is_timm_s(old, new, assert_close):
    import torch
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

    table = random_table((2 * old[0] - 1, 2 * old[1] - 1), 3)
    rows, columns = 2 * new[0] - 1, 2 * new[1] - 1
    expected = resize_rel_pos_bias_table_simple(torch.tensor(table.reshape(-1, 3)), new, (rows * columns, 3)).numpy()
    assert_close(relative_bias_bicubic(table, new), expected.reshape(rows, columns, 3), 1e-6)
