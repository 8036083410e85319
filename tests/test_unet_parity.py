"""Weights in the layout of milesial/Pytorch-UNet, against a network of its names and computation in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet_references import randomised

import eqvision
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.segmenters import unet
from eqvision.zoo import SEGMENTERS

pytestmark = pytest.mark.parity
WIDTH, DEPTH, CLASSES = 4, 4, 3


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for up in ("transposed", "bilinear"):
        row = functools.partial(unet, width=WIDTH, depth=DEPTH, up=up)
        monkeypatch.setitem(SEGMENTERS, f"toy_{up}", row)


def milesial(bilinear):
    import torch

    nn, functional = torch.nn, torch.nn.functional

    class DoubleConv(nn.Module):
        def __init__(self, inputs, outputs, between=None):
            super().__init__()
            between = between or outputs
            layers = [nn.Conv2d(inputs, between, 3, padding=1, bias=False), nn.BatchNorm2d(between), nn.ReLU()]
            layers += [nn.Conv2d(between, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            self.double_conv = nn.Sequential(*layers)

        def forward(self, x):
            return self.double_conv(x)

    class Down(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

        def forward(self, x):
            return self.maxpool_conv(x)

    class Up(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            if bilinear:
                self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                self.conv = DoubleConv(inputs, outputs, inputs // 2)
            else:
                self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
                self.conv = DoubleConv(inputs, outputs)

        def forward(self, x, skip):
            x = self.up(x)
            rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = functional.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            return self.conv(torch.cat([skip, x], dim=1))

    class OutConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, CLASSES, 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            c, part = [WIDTH * 2**i for i in range(5)], 2 if bilinear else 1
            self.inc = DoubleConv(3, c[0])
            self.down1, self.down2, self.down3 = (Down(c[i], c[i + 1]) for i in range(3))
            self.down4 = Down(c[3], c[4] // part)
            self.up1, self.up2, self.up3 = (Up(c[i], c[i - 1] // part) for i in (4, 3, 2))
            self.up4 = Up(c[1], c[0])
            self.outc = OutConv()

        def forward(self, x):
            maps = [self.inc(x)]
            for down in (self.down1, self.down2, self.down3, self.down4):
                maps.append(down(maps[-1]))
            x = maps.pop()
            for up in (self.up1, self.up2, self.up3, self.up4):
                x = up(x, maps.pop())
            return self.outc.conv(x)

    return Net()


@pytest.fixture(params=["transposed", "bilinear"])
def published(request, tmp_path):
    """(name of the toy, the network, its file)."""
    import torch

    module = randomised(milesial(request.param == "bilinear"), kernel_scale=1.4)
    path = tmp_path / "unet.pth"
    torch.save({**module.state_dict(), "mask_values": [0, 1, 2]}, path)  # as its train.py writes checkpoints
    return f"toy_{request.param}", module, path


def test_logits_and_every_tensor_there_and_back(published, rng, assert_close):
    """Images whose sides are odd before poolings."""
    import torch

    name, module, path = published
    model, state = eqvision.load(name, path)
    layout = LAYOUTS["milesial_unet"]
    assert {each.name for each in LAYOUTS.values() if each.describes(model)} == {"eqvision", layout.name}
    tensors = {n: x.numpy() for n, x in module.state_dict().items() if not layout.ignores(n)}
    again = to_layout(model, state, layout)
    assert set(again) == set(tensors)
    for each, tensor in tensors.items():
        np.testing.assert_array_equal(again[each], tensor, err_msg=each)

    images = rng.normal(size=(2, 37, 53, 3)).astype(np.float32)
    with torch.no_grad():
        expected = module.double()(torch.tensor(images).permute(0, 3, 1, 2).double()).permute(0, 2, 3, 1).numpy()
    assert_close(jax.jit(lambda m, s, x: m(x, s)[0])(model, state, jnp.asarray(images)), expected, 1e-5)


def test_the_other_form_is_refused(published):
    name, _, path = published
    other = "toy_bilinear" if name == "toy_transposed" else "toy_transposed"
    with pytest.raises(WeightsError):
        eqvision.load(other, path)
    model, _ = eqvision.load(name, path, num_classes=5)
    assert model.head.conv.weight.shape == (1, 1, WIDTH, 5)
