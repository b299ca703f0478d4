"Small random models of every kind, for several test files"
import timm, torch
from timm.models import VisionTransformer
from timm.models.mlp_mixer import MlpMixer
from torch import nn

SIZE = dict(eva02=56, swin=56, hiera=64)  # pixels, where they are not 32


def vit(depth, **more): return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5, **more)


def build(kind, depth, size):
    "`depth` blocks, or a tuple with so many in each stage"
    if kind == 'vit': return vit(depth)
    if kind == 'registers': return vit(depth, reg_tokens=4)
    if kind == 'siglip': return vit(depth, global_pool='map', class_token=False)
    if kind == 'mixer': return MlpMixer(img_size=size, patch_size=8, embed_dim=32, num_blocks=depth, num_classes=5)
    if kind == 'eva02': return timm.create_model('eva02_tiny_patch14_224', img_size=size, depth=depth, num_classes=5)
    if kind == 'swin': return timm.create_model('swin_tiny_patch4_window7_224', img_size=size, window_size=7, embed_dim=16, depths=depth, num_heads=(4, 8), num_classes=5)
    if kind == 'convnext': return timm.create_model('convnext_atto', depths=depth, dims=(8, 16, 16, 16), num_classes=5)
    if kind == 'hiera': return timm.create_model('hiera_tiny_224', img_size=size, embed_dim=16, num_heads=1, stages=depth, num_classes=5)
    raise ValueError(kind)


def noisy(model):
    "Biases, tokens and heads that are not near zero, in float64"
    for name, p in model.named_parameters():
        if p.ndim < 2 or 'token' in name or name.startswith('head'): nn.init.normal_(p, std=.3)
    return model.double().eval()


def case(kind, depth, **sizes):
    "A model, and two images that it takes"
    torch.manual_seed(0)
    size = {**SIZE, **sizes}.get(kind, 32)
    return noisy(build(kind, depth, size)), torch.randn(2, 3, size, size, dtype=torch.float64)
