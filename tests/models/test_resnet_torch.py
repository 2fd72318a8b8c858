"""Names and shapes of torchvision's ResNets, and the same features from torch where it is installed."""

import jax
import numpy as np
import pytest
import tiny

from jaxcl.errors import UserError
from jaxcl.models import ResNetOptions, make_model, weights
from jaxcl.models.resnet_torch import ResNetLayout

layout = ResNetLayout()


def variables_of(seed=0, side=32, **options):
    model = make_model(ResNetOptions(**options, head_features=0))
    params, stats = jax.eval_shape(lambda: model.init(jax.random.key(0), (side, side, 3)))
    return model, weights.flat(*tiny.fill((params["encoder"], stats), seed))


def blocks(*sizes, convs, expansion):
    """The tensors of torchvision's published state dicts but for `fc` and num_batches_tracked, written out."""
    out, channels = {"conv1.weight": (64, 3, 7, 7)}, 64

    def bn(name, n):
        out.update({f"{name}.{leaf}": (n,) for leaf in ("weight", "bias", "running_mean", "running_var")})

    bn("bn1", 64)
    for i, size in enumerate(sizes):
        planes = 64 * 2**i
        for j in range(size):
            name, first = f"layer{i + 1}.{j}", channels
            for k, side in enumerate(convs, 1):
                wide = planes * (expansion if k == len(convs) else 1)
                out[f"{name}.conv{k}.weight"] = (wide, channels, side, side)
                bn(f"{name}.bn{k}", wide)
                channels = wide
            if j == 0 and (i or expansion > 1):
                out[f"{name}.downsample.0.weight"] = (channels, first, 1, 1)
                bn(f"{name}.downsample.1", channels)
    return out


@pytest.mark.parametrize(
    "depth, count, expected",
    [
        (18, 100, blocks(2, 2, 2, 2, convs=(3, 3), expansion=1)),
        (50, 265, blocks(3, 4, 6, 3, convs=(1, 3, 1), expansion=4)),
    ],
)
def test_published_names_and_shapes(depth, count, expected):
    _, ours = variables_of(depth=depth, stem="imagenet")
    state = layout.to_torch(ours)
    assert len(state) == count and {k: v.shape for k, v in state.items()} == expected
    assert layout.architecture(ours) == {"depth": depth, "stem": "imagenet"}
    with_more = state | {
        "fc.weight": np.zeros((10, 512)),
        "fc.bias": np.zeros(10),
        "bn1.num_batches_tracked": np.zeros((), np.int64),
    }
    back = layout.from_torch(with_more)
    assert back.keys() == ours.keys() and all((back[k] == ours[k]).all() for k in ours)
    assert not layout.recognises(ours) and layout.recognises(state)


def test_where_numbers_go():
    """One number of each kind of tensor, by hand."""
    _, ours = variables_of(stage_sizes=(1, 1), stage_widths=(8, 16), stem="patch4")
    state = layout.to_torch(ours)
    assert state["conv1.weight"][5, 2, 1, 3] == ours["params.stem_conv.kernel"][1, 3, 2, 5]
    shortcut = ours["params.stages_1_0.shortcut_conv.kernel"]
    assert state["layer2.0.downsample.0.weight"][3, 1, 0, 0] == shortcut[0, 0, 1, 3]
    for theirs, name in (("weight", "params.{}.scale"), ("bias", "params.{}.bias")):
        assert (state[f"layer2.0.downsample.1.{theirs}"] == ours[name.format("stages_1_0.shortcut_bn")]).all()
    for theirs, name in (("running_mean", "mean"), ("running_var", "var")):
        assert (state[f"bn1.{theirs}"] == ours[f"batch_stats.stem_bn.{name}"]).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(depth=34, stem="patch8"),
        dict(depth=50, stage_sizes=(1, 2), stage_widths=(8, 12), stem="patch2"),
        dict(depth=18, stage_sizes=(3, 1, 1), stage_widths=(64, 128, 256), stem="cifar"),
    ],
)
def test_the_architecture_is_found_by_its_tensors(options):
    model, ours = variables_of(**options)
    found = layout.architecture(layout.from_torch(layout.to_torch(ours)))
    assert make_model(ResNetOptions(**found, head_features=0)).encoder == model.encoder


def test_what_the_layout_has_no_names_for():
    def says(text, options):
        with pytest.raises(UserError) as error:
            layout.check(make_model(options).encoder)
        assert text in str(error.value) and "\n" not in str(error.value)

    says("norm=group", ResNetOptions(norm="group"))
    says("one set of batch norms", ResNetOptions(norm_sets=("adv",)))
    says("strides (1, 2, 2, 2)", ResNetOptions(strides=(1, 1, 2, 2)))
    layout.check(make_model(ResNetOptions(depth=50, stem="imagenet")).encoder)
    for name in ("conv1", "layer1.0.conv1"):
        _, ours = variables_of(stage_sizes=(1,), stage_widths=(8,))
        state = layout.to_torch(ours)
        state.pop("layer1.0.conv2.weight")
        with pytest.raises(UserError, match="no blocks of a ResNet"):
            layout.architecture(layout.from_torch(state))
        assert f"{name}.odd" in layout.from_torch({f"{name}.odd": np.zeros(3)})


# ---- against torch


def torch_resnet(torch, kind, sizes, widths, stem):
    """A ResNet as torchvision builds it (v1.5), of any sizes and widths, with the stem as `stem_in_torch` says."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, channels, planes, stride):
            super().__init__()
            out = planes * (4 if kind == "bottleneck" else 1)
            if kind == "bottleneck":
                plan = [(channels, planes, 1, 1), (planes, planes, 3, stride), (planes, out, 1, 1)]
            else:
                plan = [(channels, planes, 3, stride), (planes, out, 3, 1)]
            self.count = len(plan)
            for k, (a, b, side, s) in enumerate(plan, 1):
                setattr(self, f"conv{k}", nn.Conv2d(a, b, side, s, side // 2, bias=False))
                setattr(self, f"bn{k}", nn.BatchNorm2d(b))
            self.downsample = None
            if stride != 1 or channels != out:
                self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x):
            y = x
            for k in range(1, self.count + 1):
                y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
                y = torch.relu(y) if k < self.count else y
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, widths[0], **stem["conv1"], bias=False)
            self.bn1 = nn.BatchNorm2d(widths[0])
            self.maxpool = nn.MaxPool2d(3, 2, 1) if stem["maxpool"] else nn.Identity()
            channels = widths[0]
            for i, (size, planes) in enumerate(zip(sizes, widths, strict=True)):
                stage = []
                for j in range(size):
                    stage.append(Block(channels, planes, 2 if i and not j else 1))
                    channels = planes * (4 if kind == "bottleneck" else 1)
                setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            self.fc = nn.Identity()

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            for i in range(len(sizes)):
                x = getattr(self, f"layer{i + 1}")(x)
            return self.fc(x.mean((2, 3)))

    return Net().eval()


SMALL = dict(stage_sizes=(2, 1, 1), stage_widths=(8, 12, 16))


@pytest.mark.parametrize(
    "options, side",
    [
        (dict(depth=18, stem="cifar", **SMALL), 16),
        (dict(depth=18, stem="imagenet", **SMALL), 33),  # odd and even sides: padding is where networks differ
        (dict(depth=50, stem="imagenet", **SMALL), 40),
        (dict(depth=50, stem="patch4", **SMALL), 22),
        pytest.param(dict(depth=18, stem="imagenet"), 224, marks=pytest.mark.slow),
        pytest.param(dict(depth=50, stem="imagenet"), 224, marks=pytest.mark.slow),
        pytest.param(dict(depth=18, stem="cifar"), 32, marks=pytest.mark.slow),
    ],
)
def test_the_same_features_in_torch(options, side, tmp_path):
    """Out: our file loaded by torch, strictly. In: a file that torch writes, of its own random weights."""
    torch = pytest.importorskip("torch")
    load, save = (getattr(pytest.importorskip("safetensors.torch"), name) for name in ("load_file", "save_file"))
    model, ours = variables_of(side=side, seed=3, **options)
    encoder, images = model.encoder, tiny.normal(2, side, side, 3, seed=1)
    run = jax.jit(lambda v: model.encode({"encoder": v[0]}, v[1], images, train=False)[0])

    def difference(a, b):
        found = float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
        print(f"{options}: largest difference {found:.1e} of the largest feature")
        return found

    def in_torch(net):
        with torch.no_grad():
            return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    net = torch_resnet(torch, encoder.block, encoder.stage_sizes, encoder.widths, layout.changes(encoder))
    weights.write(tmp_path / "out.safetensors", ours, {}, torch=layout)
    assert not any(net.load_state_dict(load(tmp_path / "out.safetensors"), strict=True))
    assert difference(run(weights.nested(ours)), in_torch(net)) < 1e-5

    torch.manual_seed(0)
    net = torch_resnet(torch, encoder.block, encoder.stage_sizes, encoder.widths, layout.changes(encoder))
    net.train()
    in_torch(net)  # moves the running statistics
    save(net.eval().state_dict(), tmp_path / "in.safetensors")
    variables, about, kind = weights.read(tmp_path / "in.safetensors")
    given = weights.fit("it", variables, model, (side, side, 3))
    assert not about and kind == "resnet" and difference(run(given), in_torch(net)) < 1e-5
