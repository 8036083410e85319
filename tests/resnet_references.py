"""Reference ResNets and BiTs of PyTorch for the parity tests: random numbers everywhere, in double precision."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from eqvision.pretrained import LAYOUTS, to_layout
from eqvision.zoo import builder

# Four stages, the second with a block that keeps its shape: the fewest that hold every kind of block.
BLOCKS = (1, 2, 1, 1)
CLASSES = 7


def randomised(module, *, kernel_scale=1.0, seed=0):
    """All parameters and running statistics drawn anew, none zero or one; in evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(drawn(name, torch.randn(tensor.shape, generator=generator), kernel_scale))
    return module.eval()


def drawn(name, noise, kernel_scale=1.0):
    """``noise`` scaled to what a tensor of this name may be; ``kernel_scale`` is for all kernels but the head's."""
    if noise.ndim > 1:
        scale = 1.0 if name.startswith(("head.", "classifier.")) else kernel_scale
        return noise * (scale / math.sqrt(math.prod(noise.shape[1:])))
    if name.endswith("running_var"):
        return (2 * noise - 2).exp()  # some so small that another eps would show
    # Norm weights about one, so that neither does the signal die nor a bias go unseen.
    return 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)


def images_for(rng, *, size=64, channels=3, scale=1.0):
    """Four images, channels last."""
    return (scale * rng.normal(size=(4, size, size, channels))).astype(np.float32)


def run(module, stages, images):
    """Logits and the outputs of ``stages``, maps channels last, in double precision. ``module`` stays double."""
    import torch

    outputs = []
    handles = [stage.register_forward_hook(lambda _, __, output: outputs.append(output)) for stage in stages]
    logits = module.double()(torch.from_numpy(np.asarray(images, np.float64).transpose(0, 3, 1, 2)))
    for handle in handles:
        handle.remove()
    logits = getattr(logits, "logits", logits)
    return logits, [output.detach().numpy().transpose(0, 2, 3, 1) for output in outputs]


def check_outputs(model, state, module, stages, images, assert_close):
    """Logits and the maps of all stages, in evaluation mode and single precision."""
    logits, maps = run(module, stages, images)
    layers = tuple(range(len(stages)))
    ours = jax.jit(lambda m, s, x: (m(x, s)[0], m.intermediates(x, s, layers)))(model, state, images)
    assert_close(ours, (logits.detach().numpy(), tuple(maps)), 1e-5)


def check_training(model, state, module, layout, images, rng, assert_close):
    """Training mode: logits, gradients of all parameters and updated statistics, both sides in double precision.

    In single precision a few ReLUs of each side fall on the other side of zero, and gradients differ by percents.
    """
    import torch

    coefficients = rng.normal(size=(len(images), CLASSES))
    logits, _ = run(module.train(), [], images)
    (logits * torch.from_numpy(coefficients)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in module.named_parameters()}
    theirs |= {name: t.numpy() for name, t in module.named_buffers() if t.is_floating_point()}

    def loss(model, state, images):
        logits, state = model(images, state, train=True)
        return (logits * coefficients).sum(), (logits, state)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (model, state, images))
        gradient, (ours, state) = jax.jit(jax.grad(loss, has_aux=True))(*wide)
        assert_close(ours, logits.detach().numpy(), 1e-6)  # the pooled map and the logits are single precision
        assert_close(to_layout(gradient, state, LAYOUTS[layout]), theirs, 1e-6)


def check_back(model, state, module, layout, images, assert_close):
    """The model's numbers under their names, loaded strictly by a module with other numbers, give the same logits."""
    import torch

    tensors = to_layout(model, state, LAYOUTS[layout])
    module.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=True)
    logits, _ = run(module, [], images)
    assert_close(jax.jit(lambda m, s, x: m(x, s)[0])(model, state, images), logits.detach().numpy(), 1e-5)


def abstract(name):
    """Shapes of a model of the zoo."""
    return eqx.filter_eval_shape(lambda: builder(name, {})(key=jax.random.key(0)))


def published_names(module):
    """Names of all tensors but the counters of batches."""
    return {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}


def layout_names(name, layout):
    """Names that a layout reads for a model of the zoo."""
    return {each for rule in LAYOUTS[layout].rules(abstract(name)) for each in rule.their_names}
