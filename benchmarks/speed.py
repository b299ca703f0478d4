#!/usr/bin/env python
"""What an explanation costs: contestants take turns in one process, and each is compared with one plain gradient.

    python benchmarks/speed.py --model vit_base_patch16_224 --batch 2 --repeats 7 --threads 1 --out benchmarks/speed.json

Weights and images are random, since speed does not depend on them. Packages that are not there are listed, not left out:
pip install 'libragrad_nb[speed]'
"""
import argparse, gc, importlib, json, os, platform, random, re, sys, time, types
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm, torch
from timm.models import VisionTransformer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from libragrad_nb import explain, libra, methods

TARGET, TARGETS, STEPS, AT_ONCE = 3, list(range(10)), 50, 16
EVERY = [name for name, m in methods.items() if not m.runs]  # those that share one forward and one backward pass
SLOW, RARELY = 20, 3  # who needs more than 20 forward and backward passes takes part in every third round

# --- what is measured on

class Question:
    "A timm ViT, images, and a twin of the model from torchvision"
    def __init__(self, name='vit_base_patch16_224', batch=2, device='cpu', seed=0):
        torch.manual_seed(seed)
        self.name, self.batch, self.device = name, batch, device
        self.model = timm.create_model(name).eval().to(device)
        if not isinstance(self.model, VisionTransformer): raise TypeError(
            f'{name} is a {type(self.model).__name__}: this comparison needs one of timm\'s VisionTransformer models, such as vit_base_patch16_224')
        self.x = torch.randn(batch, *self.model.pretrained_cfg['input_size'], device=device)

    @cached_property
    def twin(self):
        "torchvision's ViT of the same size"
        from torchvision.models import VisionTransformer as Twin
        m, b = self.model, self.model.blocks[0]
        twin = Twin(m.patch_embed.img_size[0], m.patch_embed.patch_size[0], len(m.blocks), b.attn.num_heads, m.embed_dim,
                    b.mlp.fc1.out_features, num_classes=m.num_classes)
        nn.init.normal_(twin.heads.head.weight, std=.02)  # torchvision starts with zeros, which have no gradient
        return twin.eval().to(self.device)

    def on(self, twin): return self.twin if twin else self.model
    def blocks(self, twin): return list(self.twin.encoder.layers if twin else self.model.blocks)

@contextmanager
def frozen(model):
    "No gradients for the weights"
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield model.requires_grad_(False)
    finally:
        for p, flag in flags: p.requires_grad_(flag)

# --- the contestants

@dataclass(frozen=True)
class Contestant:
    "Someone who explains: `prepare(question)` is a context, not timed, that gives the function to time"
    name:str
    family:str
    prepare:object
    maps:int=1
    needs:tuple=()    # packages, by the names that pip knows
    twin:bool=False   # on torchvision's model

contestants = []
MODULES = {'grad-cam': 'pytorch_grad_cam'}  # where a package's module has another name

def contestant(name, family, maps=1, needs=(), twin=False):
    "Enter a generator function that gives what is to be timed; the first of each model is what the others are compared with"
    def register(f):
        contestants.append(Contestant(name, family, contextmanager(f), maps, needs, twin))
        return f
    return register

def input_gradient(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x)[:, TARGET].sum(), x)[0]

def balanced_gradient(model, x):
    with libra(model): return input_gradient(model, x)

@contestant('input gradient, weights frozen', 'plain')
def _(q):
    with frozen(q.model): yield lambda: input_gradient(q.model, q.x)

@contestant('input gradient', 'plain')
def _(q): yield lambda: input_gradient(q.model, q.x)

@contestant('input gradient by .backward()', 'plain')
def _(q):
    def run():
        x = q.x.clone().requires_grad_()
        q.model(x)[:, TARGET].sum().backward()
        return x.grad
    yield run

@contestant('two forward passes', 'plain')
def _(q):
    @torch.no_grad()
    def run(): q.model(q.x); return q.model(q.x)
    yield run

@contestant('Libra gradient alone', 'libra')
def _(q): yield lambda: balanced_gradient(q.model, q.x)

@contestant('Libra Input x Gradient', 'libra')
def _(q): yield lambda: explain(q.model, q.x, TARGET, 'input_x_gradient')

@contestant('Libra FullGrad+', 'libra')
def _(q): yield lambda: explain(q.model, q.x, TARGET, 'fullgrad_plus')

@contestant(f'Libra, {len(EVERY)} methods at once', 'libra', maps=len(EVERY))
def _(q): yield lambda: explain(q.model, q.x, TARGET, EVERY)

@contestant(f'Libra FullGrad+, {len(TARGETS)} targets', 'libra', maps=len(TARGETS))
def _(q): yield lambda: explain(q.model, q.x, TARGETS, 'fullgrad_plus')

@contestant('input gradient, weights frozen, compiled', 'compiled')
def _(q):
    with frozen(q.model): yield partial(input_gradient, torch.compile(q.model), q.x)

@contestant('Libra gradient alone, compiled', 'compiled')
def _(q): yield partial(balanced_gradient, torch.compile(q.model), q.x)

@contestant('LeGrad, ours', 'libra')
def _(q): yield lambda: explain(q.model, q.x, TARGET, 'legrad', rules='plain')

@contestant('LeGrad, block by block', 'legrad')
def _(q):
    with explicit_attention(q.model) as seen: yield lambda: legrad(q.model, q.x, seen)

@contestant('captum InputXGradient', 'captum', needs=('captum',))
def _(q):
    from captum.attr import InputXGradient
    method = InputXGradient(q.model)
    yield lambda: method.attribute(q.x.clone().requires_grad_(), target=TARGET)

@contestant(f'captum IntegratedGradients, {STEPS} steps', 'captum', needs=('captum',))
def _(q):
    from captum.attr import IntegratedGradients
    method = IntegratedGradients(q.model)
    yield lambda: method.attribute(q.x, target=TARGET, n_steps=STEPS, internal_batch_size=max(AT_ONCE, q.batch))

@contestant('captum LayerGradCam', 'captum', needs=('captum',))
def _(q):
    from captum.attr import LayerGradCam
    method = LayerGradCam(q.model, q.model.blocks[-1].norm1)
    yield lambda: method.attribute(q.x, target=TARGET)

@contestant('pytorch-grad-cam GradCAM', 'grad-cam', needs=('grad-cam',))
def _(q):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    rows, cols = q.model.patch_embed.grid_size
    def as_picture(tokens):  # [B, N, C] -> [B, C, rows, cols], which the user must write
        patches = tokens[:, q.model.num_prefix_tokens:]
        return patches.transpose(1, 2).reshape(len(tokens), -1, rows, cols)
    with GradCAM(q.model, [q.model.blocks[-1].norm1], reshape_transform=as_picture) as cam:
        yield lambda: cam(q.x, [ClassifierOutputTarget(TARGET)]*q.batch)

@contestant('input gradient, weights frozen (torchvision)', 'plain', needs=('torchvision',), twin=True)
def _(q):
    with frozen(q.twin): yield lambda: input_gradient(q.twin, q.x)

@contestant('Libra gradient alone (torchvision)', 'libra', needs=('torchvision',), twin=True)
def _(q): yield lambda: balanced_gradient(q.twin, q.x)

@contestant('Libra pixels x gradient (torchvision)', 'libra', needs=('torchvision',), twin=True)
def _(q): yield lambda: explain(q.twin, q.x, TARGET, 'pixel_x_gradient')

@contestant('LXT, as documented (torchvision)', 'lxt', needs=('lxt', 'torchvision'), twin=True)
def _(q):
    from lxt.efficient import monkey_patch
    from torchvision.models import vision_transformer
    with restored(vision_transformer.nn), frozen(q.twin):
        monkey_patch(vision_transformer)
        yield lambda: pixels_x_gradient(q.twin, q.x)

@contestant('LXT, its ViT rules alone (torchvision)', 'lxt', needs=('lxt', 'torchvision'), twin=True)
def _(q):
    with restored(nn), frozen(q.twin):
        for kind, replace in lxt_rules().items(): replace(kind)
        yield lambda: pixels_x_gradient(q.twin, q.x)

FAMILIES = dict.fromkeys(c.family for c in contestants)
LATE = 'compiled',  # compiling takes minutes: only where they are asked for

# --- what some of them need

def pixels_x_gradient(model, x): return (x*input_gradient(model, x)).sum(1)

@contextmanager
def restored(nn):
    "Undo what LXT does to the classes of torch.nn, which every model in the process shares"
    kinds = nn.GELU, nn.LayerNorm, nn.MultiheadAttention
    stock = [kind.forward for kind in kinds]
    try: yield
    finally:
        for kind, forward in zip(kinds, stock):
            kind.forward = forward
            if 'original_forward' in vars(kind): del kind.original_forward

@cache
def lxt_rules():
    "LXT's rules for torchvision's ViT (CP-LRP), without the models that its package imports beside them"
    import torchvision  # before the list of modules is put back
    folder = Path(find_spec('lxt').submodule_search_locations[0])
    bare = {f'lxt.{name}': types.ModuleType(f'lxt.{name}') for name in ('efficient', 'efficient.models')}
    for name, module in bare.items(): module.__path__ = [str(folder.joinpath(*name.split('.')[1:]))]
    with patch.dict(sys.modules, bare): return importlib.import_module('lxt.efficient.models.vit_torch').cp_LRP

@contextmanager
def explicit_attention(model):
    "Attention written out, and lists of the attention weights and outputs of the blocks, filled by every forward pass"
    seen = dict(weights=[], outputs=[])
    fused = [b.attn.fused_attn for b in model.blocks]
    with ExitStack() as undo:
        for b, f in zip(model.blocks, fused):
            undo.callback(setattr, b.attn, 'fused_attn', f)
            b.attn.fused_attn = False
            undo.callback(b.attn.attn_drop.register_forward_hook(lambda m, args, out: seen['weights'].append(out)).remove)
            undo.callback(b.register_forward_hook(lambda m, args, out: seen['outputs'].append(out)).remove)
        yield seen

def legrad(model, x, seen):
    "LeGrad (arXiv 2404.03214) in the steps of its authors' package, written by us: a head and a gradient for every block, the graph kept"
    for found in seen.values(): found.clear()
    model(x)
    total = 0
    for weights, h in zip(seen['weights'], seen['outputs']):
        score = model.forward_head(model.norm(h.mean(1, keepdim=True)))[:, TARGET].sum()
        g, = torch.autograd.grad(score, weights, retain_graph=True, create_graph=True)
        total = total + g.clamp(min=0).mean((1, 2)).detach()
    for found in seen.values(): found.clear()
    return total[:, model.num_prefix_tokens:].unflatten(1, model.patch_embed.grid_size)

# --- how it is measured

@contextmanager
def count_passes(blocks, batch):
    "A dictionary that says at the end: how many passes through all blocks with the whole batch; some blocks, some images are parts of a pass"
    images, passes = dict(forward=0, backward=0), {}
    def count(way, t): images[way] += len(t)
    def hook(module, args, out):
        count('forward', out)
        if out.requires_grad: out.register_hook(lambda g: count('backward', g))
    with ExitStack() as undo:
        for b in blocks: undo.callback(b.register_forward_hook(hook).remove)
        yield passes
    passes.update({way: n/len(blocks)/batch for way, n in images.items()})

def peak_memory(run, device='cpu'):
    "What `run` returns, and the most bytes of new tensors that it held at a time, by torch's own accounting"
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        before, out = torch.cuda.memory_allocated(), run()
        torch.cuda.synchronize()
        return out, torch.cuda.max_memory_allocated() - before
    with patch.dict(os.environ, KINETO_LOG_LEVEL='99'), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: out = run()
    steps = [(e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    held = np.cumsum([n for _, n in sorted(steps, key=lambda s: s[0])])
    return out, int(max(held.max(initial=0), 0))

def timed(run, device):
    "Seconds on the clock, and seconds of processor time, that `run` takes"
    if device == 'cuda': torch.cuda.synchronize()
    gc.collect(); gc.disable()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        kept = run()
        if device == 'cuda': torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu
    finally: gc.enable()

@contextmanager
def settled():
    "Nothing that is there now will be looked at by the garbage collector, which else costs more than a small model"
    gc.collect(); gc.freeze()
    try: yield
    finally: gc.unfreeze()

@contextmanager
def turn(c, q):
    "A contestant's turn, after which the model must be as it was"
    model = q.on(c.twin)
    before = fingerprint(model)
    with c.prepare(q) as run: yield run
    model.zero_grad(set_to_none=True)
    if fingerprint(model) != before: raise RuntimeError(f'{c.name} left the model changed: the contestants after it would pay for that')

def fingerprint(model):
    "What one contestant could leave behind for the next"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), type(m).forward, m.training) for m in model.modules()]
    return hooks, [(p.requires_grad, p._version) for p in model.parameters()]

def shape_of(out):
    "The shape of what a contestant gives"
    if isinstance(out, (list, tuple)): return shape_of(out[0])
    if isinstance(out, dict): return shape_of(next(iter(out.values())))
    return list(getattr(out, 'map', out).shape)

def warm_up(c, q):
    "The first run, which is not timed: passes, memory, and the reason where there is no result"
    missing = [n for n in c.needs if find_spec(MODULES.get(n, n)) is None]
    if missing: return dict(absent=f'not installed: pip install {" ".join(missing)}')
    try:
        with turn(c, q) as run, count_passes(q.blocks(c.twin), q.batch) as passes: out, peak = peak_memory(run, q.device)
    except Exception as e:
        says = re.sub(r' \((/|\w:\\)[^)]*\)', '', ' '.join(str(e).split()))  # an import error names the folder too
        return dict(absent=f'does not run: {type(e).__name__}: {says}')
    return dict(**{k: round(v, 3) for k, v in passes.items()}, shape=shape_of(out), peak_mib=round(peak/2**20, 1))

def race(chosen, q, repeats, seed=0):
    "Every contestant's row: a warm-up, then `repeats` rounds in which all take turns in random order"
    rows = {c.name: dict(name=c.name, family=c.family, model='torchvision' if c.twin else 'timm', maps=c.maps, seconds=[], cpu_seconds=[], rounds=[])
            for c in chosen}
    dice = random.Random(seed)
    with settled():
        for c in tqdm(chosen, 'warm-up'): rows[c.name].update(warm_up(c, q))
    fit = [c for c in chosen if 'absent' not in rows[c.name]]
    def passes(c): return rows[c.name]['forward'] + rows[c.name]['backward']
    turns = []
    for r in range(repeats):
        here = [c for c in fit if passes(c) <= SLOW or r%RARELY == 0]
        turns += [(r, c) for c in dice.sample(here, len(here))]
    try:
        with settled():
            for r, c in tqdm(turns, 'turns'):
                with turn(c, q) as run: seconds, cpu = timed(run, q.device)
                for k, v in dict(seconds=seconds, cpu_seconds=cpu, rounds=r).items(): rows[c.name][k].append(v)
    except KeyboardInterrupt:  # whoever has seen enough keeps the whole rounds
        if not r: raise
        for row in rows.values():
            if r in row['rounds']:
                for k in ('seconds', 'cpu_seconds', 'rounds'): row[k].pop()
    return [compare(row, rows[reference(c, chosen).name]) for c, row in zip(chosen, rows.values())]

def reference(c, chosen): return next(o for o in chosen if o.twin == c.twin)

def quartiles(values): return [float(v) for v in np.percentile(values, [25, 50, 75])]

def compare(row, first):
    "Quartiles of the seconds, and of the ratio to what the first one took in the same round"
    if 'absent' in row: return {k: v for k, v in row.items() if v != []}
    row['quartiles'] = quartiles(row['seconds'])
    for name, of in dict(ratio_quartiles='seconds', cpu_ratio_quartiles='cpu_seconds').items():
        at = dict(zip(first['rounds'], first[of]))  # the first one is in every round
        row[name] = quartiles([s/at[r] for r, s in zip(row['rounds'], row[of])])
    return row

# --- where it is measured

PACKAGES = 'torch timm torchvision captum grad-cam lxt transformers numpy'.split()

def packages():
    "Versions of what takes part; None where it is not installed"
    def of(name):
        try: return version(name)
        except PackageNotFoundError: return None
    return {name: of(name) for name in PACKAGES} | dict(torch=torch.__version__)

def machine(device):
    "What the numbers belong to"
    info = Path('/proc/cpuinfo')
    names = [l.split(':', 1)[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.exists() else []
    gpu = dict(gpu=torch.cuda.get_device_name()) if device == 'cuda' else {}
    return dict(cpu=names[0] if names else platform.processor() or platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(), **gpu,
                system=platform.system(), python=platform.python_version(), packages=packages())

def measure(model='vit_base_patch16_224', batch=2, repeats=7, device='cpu', seed=0, chosen=None):
    "The whole comparison, as it goes into a file"
    if repeats < 1 or batch < 1: raise ValueError(f'repeats and batch must be 1 or more, not {repeats} and {batch}')
    if device == 'cuda' and not torch.cuda.is_available(): raise ValueError('torch sees no CUDA device here: use --device cpu')
    q = Question(model, batch, device, seed)
    rows = race(chosen or contestants, q, repeats, seed)
    ran = [row for row in rows if 'absent' not in row]
    share = sum(sum(r['cpu_seconds']) for r in ran)/sum(sum(r['seconds']) for r in ran)
    repeats = max(len(r['seconds']) for r in ran)
    return dict(model=model, pixels=list(q.x.shape[1:]), parameters=sum(p.numel() for p in q.model.parameters()), batch=batch, repeats=repeats, seed=seed,
                device=device, blocks=len(q.model.blocks), processors_used=round(share, 3), machine=machine(device), contestants=rows)

def as_table(result):
    "Lines of text"
    wide = max(len(r['name']) for r in result['contestants'])
    lines = [f'{"":{wide}}{"seconds":>9}{"ratio":>8}  {"quartiles":<13}{"by cpu":>8}{"forward":>9}{"backward":>9}{"maps":>6}{"MiB":>9}']
    for r in result['contestants']:
        if 'absent' in r: lines.append(f'{r["name"]:{wide}}  {r["absent"]}'); continue
        low, mid, high = r['ratio_quartiles']
        lines.append(f'{r["name"]:{wide}}{r["quartiles"][1]:9.3f}{mid:8.2f}  {f"{low:.2f}-{high:.2f}":<13}'
                     f'{r["cpu_ratio_quartiles"][1]:8.2f}{r["forward"]:9.4g}{r["backward"]:9.4g}{r["maps"]:6}{r["peak_mib"]:9.1f}')
    return '\n'.join(lines)

def save(result, path):
    "Write a file, whole or not at all"
    path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    part.replace(path)

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--model', default='vit_base_patch16_224', help="a VisionTransformer of timm's (default: %(default)s)")
    p.add_argument('--batch', type=int, default=2, help='images (default: %(default)s)')
    p.add_argument('--repeats', type=int, default=7, help='rounds (default: %(default)s); Ctrl-C ends after the last whole one')
    p.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    p.add_argument('--threads', type=int, help="of the processor (default: torch's choice)")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--only', nargs='+', choices=list(FAMILIES), help=f'families to run beside the plain ones (default: all but {", ".join(LATE)})')
    p.add_argument('--out', help='a .json file for the result, with every single time')
    a = p.parse_args(args)
    if a.threads: torch.set_num_threads(a.threads)
    chosen = [c for c in contestants if c.family in ['plain', *(a.only or [f for f in FAMILIES if f not in LATE])]]
    result = measure(a.model, a.batch, a.repeats, a.device, a.seed, chosen)
    print(as_table(result))
    if a.out: save(result, a.out)

if __name__ == '__main__': main()
