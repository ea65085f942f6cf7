"""What TransUNet's tests compare with: the published forward pass, the published names, the names of Google's files."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F


def reference(state, image, heads, n_skip, groups=32):
    """The published forward pass in evaluation mode, in elementary operations."""
    image = image.repeat(1, 3 // image.shape[1], 1, 1)
    skips, features = [], image
    if "transformer.embeddings.hybrid_model.root.conv.weight" in state:
        features, skips = reference_resnet(state, "transformer.embeddings.hybrid_model.", image, groups)
    embeddings = "transformer.embeddings."
    kernel = state[embeddings + "patch_embeddings.weight"]
    x = F.conv2d(features, kernel, state[embeddings + "patch_embeddings.bias"], stride=kernel.shape[-1])
    batch, hidden, side, _ = x.shape
    x = x.reshape(batch, hidden, side * side).permute(0, 2, 1) + state[embeddings + "position_embeddings"]

    for i in range(count(state, "transformer.encoder.layer.")):
        block = f"transformer.encoder.layer.{i}."

        def linear(y, name, block=block):
            return y @ state[f"{block}{name}.weight"].T + state[f"{block}{name}.bias"]

        y = layer_norm(state, block + "attention_norm", x)
        split = [
            linear(y, f"attn.{name}").reshape(batch, -1, heads, hidden // heads) for name in ("query", "key", "value")
        ]
        query, key, value = (part.permute(0, 2, 1, 3) for part in split)
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(hidden // heads), dim=3)
        x = x + linear((weights @ value).permute(0, 2, 1, 3).reshape(batch, -1, hidden), "attn.out")
        y = linear(layer_norm(state, block + "ffn_norm", x), "ffn.fc1")
        x = x + linear(0.5 * y * (1 + torch.erf(y / math.sqrt(2))), "ffn.fc2")
    x = layer_norm(state, "transformer.encoder.encoder_norm", x)

    x = conv_bn_relu(state, "decoder.conv_more.", x.permute(0, 2, 1).reshape(batch, hidden, side, side))
    for i in range(count(state, "decoder.blocks.")):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        if i < n_skip:
            x = torch.cat([x, skips[-1 - i]], dim=1)
        x = conv_bn_relu(state, f"decoder.blocks.{i}.conv1.", x)
        x = conv_bn_relu(state, f"decoder.blocks.{i}.conv2.", x)
    return F.conv2d(x, state["segmentation_head.0.weight"], state["segmentation_head.0.bias"], padding=1)


def reference_resnet(state, root, image, groups):
    def conv(x, name, stride, padding):
        weight = state[f"{root}{name}.weight"].double()
        mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, ((weight - mean) / (variance + 1e-5).sqrt()).float(), stride=stride, padding=padding)

    def norm(x, name, groups=groups, eps=1e-6):
        return F.group_norm(x, groups, state[f"{root}{name}.weight"], state[f"{root}{name}.bias"], eps)

    x = F.relu(norm(conv(image, "root.conv", 2, 3), "root.gn"))
    skips = [x]
    x = F.max_pool2d(x, 3, 2, 0)
    blocks = count(state, f"{root}body.block", first=1)
    for i in range(1, blocks + 1):
        for j in range(1, count(state, f"{root}body.block{i}.unit", first=1) + 1):
            unit = f"body.block{i}.unit{j}."
            stride = 2 if i > 1 and j == 1 else 1
            shortcut = x
            if f"{root}{unit}downsample.weight" in state:
                shortcut = conv(x, unit + "downsample", stride, 0)
                shortcut = norm(shortcut, unit + "gn_proj", groups=shortcut.shape[1], eps=1e-5)
            y = F.relu(norm(conv(x, unit + "conv1", 1, 0), unit + "gn1"))
            y = F.relu(norm(conv(y, unit + "conv2", stride, 1), unit + "gn2"))
            x = F.relu(norm(conv(y, unit + "conv3", 1, 0), unit + "gn3") + shortcut)
        if i < blocks:
            side = image.shape[-1] // 4 // i  # 1/4, then 1/8
            padded = torch.zeros(*x.shape[:2], side, side)
            padded[:, :, : x.shape[2], : x.shape[3]] = x
            skips.append(padded)
    return x, skips


def layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)


def conv_bn_relu(state, name, x):
    x = F.conv2d(x, state[name + "0.weight"], padding=1)
    statistics = (state[f"{name}1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.relu(F.batch_norm(x, *statistics, training=False, eps=1e-5))


def count(state, prefix, first=0):
    i = first
    while any(key.startswith(f"{prefix}{i}.") for key in state):
        i += 1
    return i - first


@torch.no_grad()
def randomise(model, seed=0):
    """Move every weight off its initial value, so that none can hide."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and (value.ndim == 1 or "position" in key):
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
    return model.eval()


def published_shapes(hidden, layers, mlp, tokens, units=(), width=64, head=512, decoder=(256, 128, 64, 16), classes=2):
    """Every key of the published state_dict and its shape."""
    shapes = {}

    def put(name, *weight, bias=True):
        shapes[name + ".weight"] = weight
        if bias:
            shapes[name + ".bias"] = weight[:1]

    resnet = "transformer.embeddings.hybrid_model."
    inputs = width
    if units:
        put(resnet + "root.conv", width, 3, 7, 7, bias=False)
        put(resnet + "root.gn", width)
    for i, number in enumerate(units):
        middle, outputs = width * 2**i, 4 * width * 2**i
        for j in range(number):
            unit = f"{resnet}body.block{i + 1}.unit{j + 1}."
            for k, shape in enumerate([(middle, inputs, 1, 1), (middle, middle, 3, 3), (outputs, middle, 1, 1)], 1):
                put(f"{unit}conv{k}", *shape, bias=False)
                put(f"{unit}gn{k}", shape[0])
            if j == 0:
                put(unit + "downsample", outputs, inputs, 1, 1, bias=False)
                put(unit + "gn_proj", outputs)
            inputs = outputs
    put("transformer.embeddings.patch_embeddings", hidden, *((inputs, 1, 1) if units else (3, 16, 16)))
    shapes["transformer.embeddings.position_embeddings"] = (1, tokens, hidden)
    for i in range(layers):
        layer = f"transformer.encoder.layer.{i}."
        for name in ("attn.query", "attn.key", "attn.value", "attn.out"):
            put(layer + name, hidden, hidden)
        put(layer + "ffn.fc1", mlp, hidden)
        put(layer + "ffn.fc2", hidden, mlp)
        put(layer + "attention_norm", hidden)
        put(layer + "ffn_norm", hidden)
    put("transformer.encoder.encoder_norm", hidden)

    def put_conv_bn(name, outputs, inputs):
        put(name + ".0", outputs, inputs, 3, 3, bias=False)
        put(name + ".1", outputs)
        shapes.update({f"{name}.1.running_mean": (outputs,), f"{name}.1.running_var": (outputs,)})
        shapes[name + ".1.num_batches_tracked"] = ()

    skips = (8 * width, 4 * width, width, 0) if units else (0, 0, 0, 0)
    put_conv_bn("decoder.conv_more", head, hidden)
    for i, ((inputs, outputs), skip) in enumerate(zip(pairwise((head, *decoder)), skips, strict=True)):
        put_conv_bn(f"decoder.blocks.{i}.conv1", outputs, inputs + skip)
        put_conv_bn(f"decoder.blocks.{i}.conv2", outputs, outputs)
    put("segmentation_head.0", classes, decoder[-1], 3, 3)
    return shapes


def google_file(hidden, heads, layers, mlp, grid, units=(), width=64, fill=None):
    """Arrays with the names and shapes of Google's ``R50+ViT-B_16.npz`` (with units) or ``ViT-B_16.npz`` (without)."""
    fill = fill or np.random.default_rng(0).standard_normal
    arrays = {}

    def put(name, **shapes):
        arrays.update({f"{name}/{leaf}": fill(shape).astype(np.float32) for leaf, shape in shapes.items()})

    def put_norm(name, channels):
        put(name, scale=(1, 1, 1, channels), bias=(1, 1, 1, channels))

    inputs, each = width, hidden // heads
    if units:
        put("conv_root", kernel=(7, 7, 3, width))
        put_norm("gn_root", width)
    for i, number in enumerate(units):
        middle, outputs = width * 2**i, 4 * width * 2**i
        for j in range(number):
            unit = f"block{i + 1}/unit{j + 1}"
            put(f"{unit}/conv1", kernel=(1, 1, inputs, middle))
            put(f"{unit}/conv2", kernel=(3, 3, middle, middle))
            put(f"{unit}/conv3", kernel=(1, 1, middle, outputs))
            for k, channels in enumerate((middle, middle, outputs), 1):
                put_norm(f"{unit}/gn{k}", channels)
            if j == 0:
                put(f"{unit}/conv_proj", kernel=(1, 1, inputs, outputs))
                put_norm(f"{unit}/gn_proj", outputs)
            inputs = outputs
    put("embedding", kernel=(1, 1, inputs, hidden) if units else (16, 16, 3, hidden), bias=(hidden,))
    put("Transformer/posembed_input", pos_embedding=(1, grid**2 + 1, hidden))
    for i in range(layers):
        block = f"Transformer/encoderblock_{i}"
        for name in ("query", "key", "value"):
            put(f"{block}/MultiHeadDotProductAttention_1/{name}", kernel=(hidden, heads, each), bias=(heads, each))
        put(f"{block}/MultiHeadDotProductAttention_1/out", kernel=(heads, each, hidden), bias=(hidden,))
        put(f"{block}/MlpBlock_3/Dense_0", kernel=(hidden, mlp), bias=(mlp,))
        put(f"{block}/MlpBlock_3/Dense_1", kernel=(mlp, hidden), bias=(hidden,))
        put(f"{block}/LayerNorm_0", scale=(hidden,), bias=(hidden,))
        put(f"{block}/LayerNorm_2", scale=(hidden,), bias=(hidden,))
    put("Transformer/encoder_norm", scale=(hidden,), bias=(hidden,))
    put("pre_logits", kernel=(hidden, hidden), bias=(hidden,))
    put("head", kernel=(hidden, 5), bias=(5,))
    arrays["cls"] = np.zeros((1, 1, hidden), np.float32)
    return arrays
