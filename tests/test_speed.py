"The speed comparison: contestants give the maps that they are named for, counts and memory are right, and what is absent is listed"
import json, re, sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest, torch
from torch import nn
from libragrad_nb import explain

FOLDER = Path(__file__).resolve().parents[1]/'benchmarks'
sys.path.insert(0, str(FOLDER))
import speed
sys.path.remove(str(FOLDER))

def named(part):
    found = [c for c in speed.contestants if part in c.name]
    assert len(found) == 1, found
    return found[0]

def result(c, q):
    with speed.turn(c, q) as run: return run()

def need(*modules):
    for m in modules: pytest.importorskip(m)

@pytest.fixture(scope='module')
def q(): return speed.Question('test_vit', batch=2)

@pytest.fixture(scope='module')
def gradient(q): return result(speed.contestants[0], q)

@pytest.fixture
def fewer_steps(monkeypatch): monkeypatch.setattr(speed, 'STEPS', 4)

# --- everyone answers the question that is asked

@pytest.mark.parametrize('name', ['input gradient by .backward()', 'input gradient, weights frozen (torchvision)'])
def test_the_gradient_is_the_gradient(name, q, gradient):
    if 'torchvision' in name:
        with torch.no_grad(): assert q.twin(q.x).shape == q.model(q.x).shape and q.twin(q.x).any()
        gradient = speed.input_gradient(q.twin, q.x)
    assert gradient.any() and torch.allclose(result(named(name), q), gradient, atol=1e-6)

def test_captum_is_asked_the_same(q, gradient):
    need('captum')
    assert torch.allclose(result(named('InputXGradient'), q), q.x*gradient, atol=1e-6)

def test_integrated_gradients_takes_its_steps(q, fewer_steps):
    need('captum')
    found = result(named('IntegratedGradients'), q)
    nodes, weights = torch.from_numpy(np.array(np.polynomial.legendre.leggauss(4))).float()
    mine = sum(w/2*speed.input_gradient(q.model, q.x*(1 + a)/2) for a, w in zip(nodes, weights))*q.x
    assert torch.allclose(found.float(), mine, atol=1e-5)

def test_legrad_block_by_block_is_legrad(q):
    found, ours = result(named('LeGrad, block by block'), q), result(named('LeGrad, ours'), q)
    assert ours.map.any() and torch.allclose(found, ours.map, rtol=1e-4, atol=1e-6*ours.map.max())

def test_grad_cam_is_grad_cam(q):
    need('pytorch_grad_cam')
    found = torch.from_numpy(result(named('pytorch-grad-cam'), q))
    kept = []
    handle = q.model.blocks[-1].norm1.register_forward_hook(lambda m, args, out: kept.append(out))
    try: score = q.model(q.x)[:, speed.TARGET].sum()
    finally: handle.remove()
    h, g = kept[0], torch.autograd.grad(score, kept[0])[0]
    patches = slice(q.model.num_prefix_tokens, None)
    mine = (g[:, patches].mean(1, keepdim=True)*h[:, patches]).sum(-1).relu()
    for a, b in zip(found, mine.detach().unflatten(1, q.model.patch_embed.grid_size)):  # theirs is scaled to the image and to [0, 1]
        small = nn.functional.interpolate(a[None, None], b.shape, mode='area')[0, 0]
        assert torch.corrcoef(torch.stack([small.flatten(), b.flatten()]))[0, 1] > .9

def test_lxt_and_libra_draw_the_same_pixels(q):
    need('torchvision')
    if find_spec('lxt') is None: pytest.skip('lxt is not installed')
    theirs, ours = result(named('LXT, its ViT rules alone'), q), result(named('Libra pixels x gradient'), q).map
    plain = (q.x*speed.input_gradient(q.twin, q.x)).sum(1)
    assert (theirs - ours).norm() < 1e-3*ours.norm() < .1*(plain - ours).norm()

# --- nobody leaves anything behind

def test_lxt_is_undone(q):
    if find_spec('lxt') is None: pytest.skip('lxt is not installed')
    stock = nn.GELU.forward, nn.LayerNorm.forward, nn.MultiheadAttention.forward
    with speed.turn(named('LXT, its ViT rules alone'), q): assert nn.GELU.forward is not stock[0]
    assert (nn.GELU.forward, nn.LayerNorm.forward, nn.MultiheadAttention.forward) == stock
    assert not hasattr(nn.GELU, 'original_forward') and 'lxt.efficient' not in sys.modules

def leaves(what):
    def prepare(q):
        yield what(q)
    return speed.Contestant('untidy', 'plain', speed.contextmanager(prepare))

@pytest.mark.parametrize('what', [
    lambda q: q.model.norm.register_forward_hook(lambda *a: None), lambda q: q.model.requires_grad_(False),
    lambda q: nn.init.ones_(q.model.norm.weight), lambda q: q.model.train()], ids=['hook', 'frozen', 'weight', 'training'])
def test_a_change_of_the_model_is_noticed(what):
    q = speed.Question('test_vit', batch=1)
    with pytest.raises(RuntimeError, match='untidy left the model changed'):
        with speed.turn(leaves(what), q): pass

# --- passes and memory

def passes(q, run, twin=False):
    with speed.count_passes(q.blocks(twin), q.batch) as n: run()
    return n['forward'], n['backward']

def test_passes(q):
    with torch.no_grad(): assert passes(q, lambda: q.model(q.x)) == (1, 0)
    assert passes(q, lambda: q.model(q.x[:1])) == (.5, 0)
    assert passes(q, lambda: explain(q.model, q.x, [1, 2, 3], 'grad_cam')) == (1, 3)
    assert passes(q, lambda: speed.input_gradient(q.twin, q.x), twin=True) == (1, 1)
    def two_of_all_blocks():
        h = torch.ones(2, 5, q.model.embed_dim, requires_grad=True)
        torch.autograd.grad(q.model.blocks[1](q.model.blocks[0](h)).sum(), h)
    assert passes(q, two_of_all_blocks) == (2/len(q.model.blocks),)*2

def test_peak_memory_of_known_allocations():
    mib = 2**18  # float32
    def up_and_down():
        a = torch.empty(3*mib)
        b = torch.empty(2*mib)
        del a
        return torch.empty(mib), b
    assert speed.peak_memory(up_and_down)[1] == 5*2**20
    there = [torch.empty(8*mib)]
    def less(): there.clear(); return torch.empty(mib)
    assert speed.peak_memory(less)[1] == 2**20  # what was there before is not given credit for
    assert speed.peak_memory(lambda: None)[1] == 0
    x = torch.ones(mib, requires_grad=True)
    peak = speed.peak_memory(lambda: torch.autograd.grad(x.exp().exp().sum(), x))[1]
    assert 2*2**20 <= peak < 5*2**20  # two saved outputs, and gradients on the way back

def test_frozen_weights_need_less_memory(q):
    peaks = []
    for c in speed.contestants[:2]:
        with speed.turn(c, q) as run: peaks.append(speed.peak_memory(run)[1])
    assert peaks[0] < peaks[1]

# --- the race

def toy(name):
    "A contestant that keeps a diary"
    def prepare(q): yield lambda: DIARY.append(name) or torch.zeros(1)
    return speed.Contestant(name, 'plain', speed.contextmanager(prepare))

DIARY = []

@pytest.fixture
def toys(monkeypatch):
    "Clock readings by name: round k takes k + 1 times as long for everyone"
    DIARY.clear()
    takes = dict(a=1., b=3., slow=40.)
    def warm_up(c, q): return dict(absent='not installed') if c.name == 'gone' else dict(forward=takes[c.name], backward=0., shape=[1], peak_mib=0.)
    def timed(run, device):
        run()
        return takes[DIARY[-1]]*DIARY.count('a' if DIARY[-1] == 'slow' else DIARY[-1]), 1.
    monkeypatch.setattr(speed, 'warm_up', warm_up); monkeypatch.setattr(speed, 'timed', timed)
    return [toy(n) for n in ('a', 'b', 'gone', 'slow')]

def test_turns_and_ratios(toys, q):
    a, b, gone, slow = speed.race(toys, q, repeats=7)
    assert len(a['seconds']) == len(b['seconds']) == 7 and slow['rounds'] == [0, 3, 6]  # 40 passes: every third round
    assert a['ratio_quartiles'] == [1, 1, 1] and b['ratio_quartiles'] == [3, 3, 3]     # a slow round is slow for both
    assert a['quartiles'] == [2.5, 4, 5.5] and b['cpu_ratio_quartiles'] == [1, 1, 1]
    assert 'seconds' not in gone and gone['absent'] == 'not installed'

def test_the_order_is_random_and_repeatable(toys, q):
    def diary(seed):
        DIARY.clear(); speed.race(toys, q, 7, seed)
        return list(DIARY)
    one = diary(0)
    assert one == diary(0) != diary(1) and sorted(one[:3]) == ['a', 'b', 'slow'] and one != ['a', 'b', 'slow']*7

def test_an_interrupted_race_keeps_whole_rounds(toys, q, monkeypatch):
    stock = speed.timed
    def stopped(*args):
        if len(DIARY) == 8: raise KeyboardInterrupt
        return stock(*args)
    monkeypatch.setattr(speed, 'timed', stopped)
    a, b, _, slow = speed.race(toys, q, repeats=7)
    assert a['rounds'] == b['rounds'] == [0, 1, 2] and slow['rounds'] == [0]  # 3 + 2 + 2, and one of the next round

def test_timed_keeps_the_collector_as_it_was():
    import gc
    seconds, cpu = speed.timed(lambda: sum(range(100_000)), 'cpu')
    assert seconds > 0 and cpu > 0 and gc.isenabled()
    with pytest.raises(ZeroDivisionError): speed.timed(lambda: 1/0, 'cpu')
    assert gc.isenabled()

# --- what is absent, and what is refused

def test_what_is_absent_is_listed(q, monkeypatch):
    for name in ('captum', 'pytorch_grad_cam', 'lxt'): monkeypatch.setitem(sys.modules, name, None)
    said = {c.name: speed.warm_up(c, q).get('absent') for c in speed.contestants if set(c.needs) & {'captum', 'grad-cam', 'lxt'}}
    assert said['captum LayerGradCam'] == 'not installed: pip install captum'
    assert said['pytorch-grad-cam GradCAM'] == 'not installed: pip install grad-cam'
    assert said['LXT, as documented (torchvision)'] == 'not installed: pip install lxt'
    assert len(said) == 6 and all(said.values())

def test_what_does_not_run_says_why(q):
    def prepare(q):
        raise ImportError("cannot import name 'x' from 'y' (/home/someone/y.py)")
        yield
    c = speed.Contestant('broken', 'plain', speed.contextmanager(prepare))
    assert speed.warm_up(c, q) == dict(absent="does not run: ImportError: cannot import name 'x' from 'y'")

def test_mistakes():
    with pytest.raises(TypeError, match='is a SwinTransformer'): speed.Question('swin_tiny_patch4_window7_224')
    with pytest.raises(ValueError, match='1 or more'): speed.measure('test_vit', repeats=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='no CUDA'): speed.measure('test_vit', device='cuda')

# --- the whole script, and what it left in the repository

def test_the_script(tmp_path, capsys, fewer_steps):
    out = tmp_path/'new'/'speed.json'
    threads = torch.get_num_threads()
    try: speed.main(['--model', 'test_vit', '--batch', '1', '--repeats', '1', '--threads', '1', '--out', str(out)])
    finally: torch.set_num_threads(threads)
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    asked = [c for c in speed.contestants if c.family not in speed.LATE]
    assert [r['name'] for r in found['contestants']] == [c.name for c in asked] and all(c.name in said for c in asked)
    assert [p.name for p in out.parent.iterdir()] == ['speed.json'] and found['machine']['threads'] == 1
    for r in found['contestants']:
        if 'absent' not in r: assert len(r['seconds']) == 1 and r['seconds'][0] > 0 and r['forward'] >= 1 and r['peak_mib'] > 0
    row = {r['name']: r for r in found['contestants']}
    for name, n in (('Libra FullGrad+', 1), (f'Libra, {len(speed.EVERY)} methods at once', 1), ('Libra FullGrad+, 10 targets', 10)):
        assert (row[name]['forward'], row[name]['backward']) == (1, n)

@pytest.mark.parametrize('file', sorted(FOLDER.glob('*.json')), ids=lambda f: f.name)
def test_the_committed_results_belong_to_the_script(file):
    found = json.loads(file.read_text())
    families = {r['family'] for r in found['contestants']}
    assert [r['name'] for r in found['contestants']] == [c.name for c in speed.contestants if c.family in families], 'run benchmarks/speed.py again'
    first = {r['model']: r for r in reversed(found['contestants'])}
    for r in found['contestants']:
        if 'absent' in r: continue
        assert r['ratio_quartiles'] == speed.compare(dict(r), first[r['model']])['ratio_quartiles'], r['name']
    assert not re.search(r'[\s"(]/\w+/', file.read_text()), 'a folder of the machine'
