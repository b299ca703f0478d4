"Eight threads explain at once, and each gets to the bit what it would get alone"
import sys, threading

import matplotlib.pyplot as plt, pytest, torch

from kinds import vit
from libragrad_nb import explain, ledger, methods, water_level
from libragrad_nb.colours import as_png
from libragrad_nb.core import LIBRA
from libragrad_nb.trace import as_function
from libragrad_nb.zoo import load
from libragrad_nb.scenes import coloured_scenes, recall, scenes
from untouched import differences, of_model, of_torch

pytest.importorskip('transformers'); pytest.importorskip('captum')
QUICK = dict(steps=2, samples=2, progress=False)
def quick(name): return {k: v for k, v in QUICK.items() if name and k in methods[name].options}

def stretched():
    "A model that two threads share"
    torch.manual_seed(0)
    model = vit(4).eval()
    for p in model.parameters(): p.data += .2*torch.randn_like(p)
    return model

@pytest.fixture(scope='module')
def cases():
    digits, small = scenes(1, digits=2).images, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shared = stretched()
    return dict(shared=(shared, small), again=(shared, small.flip(0) + 1), mixer=(load('mixer_digits'), digits), eva=(load('eva_digits'), digits), gmixer=(load('gmixer_digits'), digits),
                registers=(load('vit_reg_digits'), digits), clip=(load('clip_digits').prompted(['a red three', 'a blue one']), coloured_scenes(1).images), llama=(load('llama_recall'), recall(1).tokens))

def jobs(name):
    "Methods and rules for one thread"
    kinds = [(None, 'libra'), (None, 'plain'), ('fullgrad', 'attnlrp'), ('smooth_grad', None)]
    if name in ('shared', 'again'): kinds += [('legrad', None), ('decompx', None), ('caap', None), ('kernel_shap', None), ('shapley_sampling', None), (None, {**LIBRA, torch.nn.LayerNorm: lambda out, m, x: out})]
    if name not in ('mixer', 'gmixer'): kinds += [('gen_att', 'libra'), ('token_tm', 'plain'), ('attention_rollout', None)]
    return kinds + [('ledger', 'libra')]

def run(case, method, rules):
    model, x = case
    if method == 'ledger':
        f, start = as_function(model, x)
        sheet = ledger(f, start, None if x.is_floating_point() else lambda o: o.logits[:, -1, 3], rules, parts=model)
        return torch.tensor([a for r in sheet.rows for a in (r.inflow, r.outflow, r.constants)])
    a = explain(model, x, None, method, rules, **quick(method))
    return torch.cat([a.map.flatten(1), a.prefix, a.unplaced[:, None], a.score[:, None]], 1)

@pytest.fixture(scope='module')
def alone(cases): return {name: [run(case, *job) for job in jobs(name)] for name, case in cases.items()}

@pytest.mark.parametrize('interval', [None, 1e-6], ids=['usual', 'restless'])
def test_eight_threads(interval, cases, alone):
    "`restless`: the interpreter changes threads as often as it can"
    before, usual = ([of_model(m) for m, _ in cases.values()], of_torch()), sys.getswitchinterval()
    wrong, start = [], threading.Barrier(len(cases))
    def work(name):
        start.wait()
        for job, expected in zip(jobs(name), alone[name]):
            try: same = torch.equal(run(cases[name], *job), expected)
            except Exception as e: same = e
            if same is not True: wrong.append((name, job[0], same))
    threads = [threading.Thread(target=work, args=(name,)) for name in cases]
    if interval: sys.setswitchinterval(interval)
    try:
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(usual)
    assert not wrong and not differences(before, ([of_model(m) for m, _ in cases.values()], of_torch()))

def test_threads_of_one_model_with_rules_for_its_modules():
    "Hooks come and go on the same modules all the time, each thread with rules of its own"
    model, x = stretched(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    def passing(out, m, *args, **kwargs): return out
    def halved(out, m, *args, **kwargs): return out/2 + out.detach()/2
    rules = [{**LIBRA, type(model.blocks[0].mlp): h, torch.nn.LayerNorm: passing, type(model.blocks[0].attn): passing} for h in (passing, halved)] + ['libra', 'plain']
    expected, wrong = [explain(model, x, 1, 'fullgrad', r).map for r in rules], []
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    before, usual = of_model(model), sys.getswitchinterval()
    def work(k):
        for _ in range(12):
            if not torch.equal(explain(model, x, 1, 'fullgrad', rules[k]).map, expected[k]): wrong.append(k)
    threads = [threading.Thread(target=work, args=(k % len(rules),)) for k in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for t in threads: t.start()
        for t in threads: t.join()
    finally: sys.setswitchinterval(usual)
    assert not wrong and not differences(before, of_model(model))

def test_pictures_from_threads():
    "matplotlib keeps figures in one list for all"
    plt.switch_backend('Agg')
    model, x = stretched(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, sheet = explain(model, x, 1), ledger(model, x, 1, 'plain')
    draw = [lambda: a._repr_html_(), lambda: as_png(a.show()), lambda: as_png(water_level(sheet))]
    expected, wrong, before = [f() for f in draw], [], plt.get_fignums()
    def work(k):
        try:
            for f, e in zip(draw[k:] + draw[:k], expected[k:] + expected[:k]):
                if f() != e: wrong.append(k)
        except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=work, args=(k % 3,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and plt.get_fignums() == before
