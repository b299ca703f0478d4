"Parity in float64 with maps that the LibraGrad authors' own code returned on a small random ViT (tests/golden)"
from dataclasses import dataclass, replace
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file
from timm.models import VisionTransformer

from libragrad_nb import libra, only, without
from libragrad_nb.attention_maps import ResidualSums
from libragrad_nb.gradient_maps import methods
from libragrad_nb.trace import trace

GOLDEN = load_file(Path(__file__).parent/'golden'/'vit_official.safetensors')
BRANDS = {'LX1': 'libra', 'NG': 'plain', 'LX-NA': 'alilrp', 'LX-GA-D2': 'attnlrp', 'LX-GA-DU': 'attnlrp_thirds', 'LX-NAB': 'libra_taylor',
          'LX-N_LN': without('layernorm'), 'LXA': only('attention'), 'LN': only('layernorm'), 'Gate': only('activations')}
SCORES = {'S0': 'logit', 'S1': 'probability'}
DEPTH, HALF = 4, 2
FILED = sorted({tuple(k.split('/')[:2]) for k in GOLDEN if k.count('/') == 2})  # brands and scores that the file has
# DecompX is the authors' LX1 on a logit; its own rule set must give the same maps. Explicit attention hides no thirds (07).
RUNS = [(b, s, BRANDS[b], fused) for b, s in FILED for fused in (True, False) if fused or b != 'LX-GA-DU'] + [('LX1', 'S0', 'decompx', True)]

# official names of maps by the names of our methods; an option per block or sign where the authors have a name for each
BLOCKS = {'plus': '_sum', 'skip_plus': f'_sum_f{HALF}'}
OFFICIAL = {'attention_rollout': 'MeanAttn_ro_str50', 'gen_att': 'MeanReLU__AttnGrad_Attn_ro_str50', 'att_cat': 'CAT_s:sum_AttnFrom_sum_to3', 'token_tm': 'TokenTM'}
PER_BLOCK = {'grad_cam': 'GCAM_s:sum', 'xgrad_cam_plus': 'XACAM_s:sum', 'input_x_gradient': 'CAT_s:sum', 'raw_attention': 'MeanAttn', 'attn_cam': 'AttnWHeadGrad'}
SIGNED = {'attention_gradient': dict(signed='MeanAttnGrad', absolute='MeanAbsAttnGrad', positive='MeanReLUAttnGrad'),
          'attention_x_gradient': dict(signed='Mean__AttnGrad_Attn', absolute='MeanAbs__AttnGrad_Attn', positive='MeanReLU__AttnGrad_Attn'),
          'mean_attention_x_gradient': dict(signed='MeanAttnGrad_MeanAttn', positive='MeanReLUAttnGrad_MeanAttn')}


def questions():
    "(method, options, official name) of every map that is a method of ours with options"
    yield from ((name, {}, key) for name, key in OFFICIAL.items())
    named = [(name, {}, key) for name, key in PER_BLOCK.items()] + [(n, dict(sign=s), key) for n, signs in SIGNED.items() for s, key in signs.items()]
    for name, options, key in named:
        yield from ((name, dict(options, block=i), f'blocks__{i}__{key}') for i in range(DEPTH))
        yield from ((name, dict(options, block=b), key + end) for b, end in BLOCKS.items())


@dataclass(frozen=True)
class Third:
    """The authors' rule LX-GA-DU gives the attention matrix a third of the product's gradient, and they look at it behind the rule;
    ours is looked at in front of it (09a). This reader divides first."""
    inner: object
    def read(self, here, above): return self.inner.read(replace(here, gradient=here.gradient/3), above)
    def __getattr__(self, name): return getattr(object.__getattribute__(self, 'inner'), name)


@dataclass(frozen=True)
class OneBlock:
    "TokenTM's matrix of a single block"
    def watcher(self): return ResidualSums()
    def read(self, here, above): return methods['token_tm'].wants()[0].read(here, None)


def gradient_sum(h, g): return g.sum(-1)


def build(fused):
    m = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=DEPTH, num_heads=3, num_classes=10).double().eval()
    m.load_state_dict({k.removeprefix('weight/'): v for k, v in GOLDEN.items() if k.startswith('weight/') and '.attn.value.' not in k})
    for block in m.blocks: block.attn.fused_attn = fused
    return m


MODELS = {fused: build(fused) for fused in (True, False)}


def official(tokens, unplaced):
    "The authors put the head's bias, which has no place, on the class token"
    return torch.cat([tokens[:, :1] + unplaced[:, None], tokens[:, 1:]], 1)


def traced(model, brand, score, rules):
    "Maps by official name that come from a trace and from the registered methods"
    asked = [(methods[name], options, key) for name, options, key in questions() if key in golden(brand, score)]
    terms = dict.fromkeys(term for m, options, _ in asked for term in m.wants(**options)) | {OneBlock(): None, gradient_sum: None}
    wrap = Third if brand == 'LX-GA-DU' else lambda term: term
    terms = [wrap(term) if hasattr(term, 'read') else term for term in terms]
    t, = trace(model, GOLDEN['image'].double(), GOLDEN['label'], rules, SCORES[score], terms)
    t.terms = {getattr(term, 'inner', term): sheet for term, sheet in t.terms.items()}
    maps = {'target': t.score}
    maps |= {key: m(t, **options)[0] for m, options, key in asked}
    received = t.term(methods['att_cat'].wants()[0])
    maps |= {f'blocks__{i}__CAT_s:sum_AttnFrom': received[i]*t.input_x_gradient[i+1] for i in range(DEPTH - 1)}
    maps |= {f'blocks__{i}__TokenTM': m for i, m in enumerate(t.term(OneBlock()))}
    series = t.term(gradient_sum)
    maps |= {f'blocks__{i}__PatchGrad_s:sum': m for i, m in enumerate(series)}
    maps |= {'PatchGrad_s:sum_sum': series.sum(0), f'PatchGrad_s:sum_sum_f{HALF}': series[HALF:].sum(0)}
    for i, ixg in enumerate(t.input_x_gradient):
        placed, unplaced = t.constants_from(i)
        maps[f'blocks__{i}__CAT_s:sum'] = ixg
        maps[f'blocks__{i}__FGrad_s:sum'] = official(ixg + placed, unplaced)
    maps['FGrad_s:sum_start'] = official(*t.constants_from(0))
    # the authors sum over blocks where our default averages: their map is ours times the number of blocks
    for name, key, factor in [('fullgrad_plus', 'FGrad_s:sum_sum', DEPTH), ('skip_plus', f'FGrad_s:sum_sum_f{HALF}', DEPTH - HALF),
                              ('fullgrad_plus_once', 'CAT_s:sum_sum_FGrad_s:sum', 1), ('skip_plus_once', f'CAT_s:sum_sum_f{HALF}_FGrad_s:sum', 1)]:
        tokens, unplaced = methods[name](t)
        maps[key] = official(factor*tokens, factor*unplaced)
    return maps


def by_formula(model, brand, score, rules):
    "Maps by official name from the inputs h of the blocks and their gradients g, written out; no trace"
    kept = {}
    def keep(name):
        def hook(module, args, out=None): kept[name] = args[0] if out is None else out
        return hook
    hooks = [b.register_forward_pre_hook(keep(i)) for i, b in enumerate(model.blocks)] + [model.norm.register_forward_hook(keep('norm'))]
    with libra(model, rules): logits = model(GOLDEN['image'].double().requires_grad_())
    for h in hooks: h.remove()
    y = (logits.softmax(-1) if score == 'S1' else logits).gather(1, GOLDEN['label'][:, None]).sum()
    *gs, after_norm, head = torch.autograd.grad(y, [kept[i] for i in range(DEPTH)] + [kept['norm'], logits])
    maps, per_block = {'target': (logits.softmax(-1) if score == 'S1' else logits).gather(1, GOLDEN['label'][:, None])[:, 0]}, {}
    for i, g in enumerate(gs):
        h = kept[i].detach()
        per_block['GCAM_s:sum', i] = (g.mean(1, keepdim=True)*h).sum(-1)
        weights = (g*h.abs()).sum(1, keepdim=True)/(h.abs().sum(1, keepdim=True) + 1e-7)
        per_block['XACAM_s:sum', i] = (weights*h).sum(-1)
        per_block['PatchGrad_s:sum', i] = g.sum(-1)
        maps[f'blocks__{i}__CAT_s:sum'] = (g*h).sum(-1)
    for name in ('GCAM_s:sum', 'XACAM_s:sum', 'PatchGrad_s:sum'):
        series = torch.stack([per_block[name, i] for i in range(DEPTH)])
        maps.update({f'blocks__{i}__{name}': m for i, m in enumerate(series)})
        maps.update({f'{name}_sum': series.sum(0), f'{name}_sum_f{HALF}': series[HALF:].sum(0)})
    maps['FGrad_s:sum_end'] = official((after_norm*model.norm.bias).sum(-1), (head*model.head.bias).sum(-1))
    return {k: v.detach() for k, v in maps.items()}


def golden(brand, score): return {k.split('/')[2]: v for k, v in GOLDEN.items() if k.startswith(f'{brand}/{score}/')}
def name(run): return f'{run[0]}-{run[1]}-{getattr(run[2], "name", run[2])}-{"fused" if run[3] else "explicit"}'


@pytest.mark.parametrize('how', [traced, by_formula])
@pytest.mark.parametrize('run', RUNS, ids=name)
def test_maps(run, how):
    brand, score, rules, fused = run
    theirs, ours = golden(brand, score), how(MODELS[fused], brand, score, rules)
    assert len(ours) > 15 and not set(ours) - set(theirs)
    wrong = {k: (m - theirs[k]).abs().max().item() for k, m in ours.items() if not torch.allclose(m, theirs[k], rtol=0, atol=1e-12)}
    assert not wrong, f'{len(wrong)} of {len(ours)} maps differ: {wrong}'


@pytest.mark.parametrize('brand, score', FILED)
def test_every_map_of_the_file_is_tested(brand, score):
    tested = {k for how in (traced, by_formula) for k in how(MODELS[True], brand, score, BRANDS[brand])}
    assert set(golden(brand, score)) == tested


def test_the_file_is_whole():
    assert sum(len(golden(*run)) for run in FILED) == 1128


def test_rule_sets_differ():
    "The brands are no aliases of each other: each has a map of its own"
    maps = [golden(b, s)['blocks__0__FGrad_s:sum'] for b, s in FILED]
    assert min((a - b).abs().max() for i, a in enumerate(maps) for b in maps[:i]) > 1e-4


def test_forward():
    for model in MODELS.values():
        with torch.no_grad(): torch.testing.assert_close(model(GOLDEN['image'].double()), GOLDEN['logits'], rtol=0, atol=1e-12)
