"The benchmark: what is asked, what is written, what happens when it goes wrong"
import signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from libragrad_nb import benchmark as b
from libragrad_nb.evidence import count, means, paired, results
from libragrad_nb.examples import ImageFiles, class_numbers, digit_examples, prompt_examples, recall_examples, _draw
from libragrad_nb.zoo import load

QUICK = dict(methods=('input_x_gradient', 'grad_cam'), ablations=False, pictures=2, progress=False)

@pytest.fixture(scope='module')
def vit(): return load('vit_digits')

@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return timm.create_model('test_vit').eval()  # random weights, 1000 classes

def tasks(vit, n=4): return {('vit_digits', '2 digits'): (vit, digit_examples(n, seed=8))}

# what is asked

def test_rivals_are_the_masks_of_the_other_questions():
    for e in (digit_examples(5, 3, seed=2), prompt_examples(5, 2, seed=2)):
        k = len(e)//5
        for i in range(5):
            own = e.masks[k*i:k*i+k]
            for j in range(k): assert torch.equal(e.rivals[k*i + j], own[[m for m in range(k) if m != j]].any(0))

def test_the_prompt_of_an_example_names_its_digit_and_its_colour():
    from libragrad_nb.scenes import PROMPTS, coloured_scenes
    s, e = coloured_scenes(6, 2, seed=4), prompt_examples(6, 2, seed=4)
    assert [PROMPTS[t] for t in e.target] == [p for row in s.prompts for p in row]

def test_texts_hold_the_answer_where_the_mask_says():
    e = recall_examples(20, 4, seed=1)
    assert torch.equal(e.inputs[e.masks[:, 0]], e.target)
    assert (e.rivals.sum((1, 2)) == 3).all()

# files

def test_a_folder_and_a_csv_say_the_same(tmp_path, tiny):
    folder = _draw(tmp_path/'photos')
    rows = [f'photos/{c}/{k}.png,{c},photos-masks/{c}/{k}.png' for c in ('3', '207') for k in range(3)]
    (tmp_path/'list.csv').write_text('\n'.join(['image,class,mask', *rows]))
    by_name = lambda files: (lambda e: (o := np.argsort(e.ids)) is not None and (e.inputs[o], e.target[o], e.masks[o]))(files[:10])
    for a, c in zip(by_name(ImageFiles(folder, tiny)), by_name(ImageFiles(tmp_path/'list.csv', tiny))): assert torch.equal(a, c)

@pytest.fixture
def imagenet_s(tmp_path, tiny):
    "A validation folder of ImageNet-S: masks of R + 256 G, in which other classes and pixels to ignore also stand"
    wnids = sorted(class_numbers(tiny))[300:600]  # numbers above 255
    for k, w in enumerate(wnids, 1):
        for part in ('validation', 'validation-segmentation'): (tmp_path/part/w).mkdir(parents=True)
        if k not in (7, 290): continue
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path/f'validation/{w}/x.JPEG')
        numbers = np.zeros((64, 64), int); numbers[20:40, 20:40] = k; numbers[20:40, 42:50] = 5; numbers[45:50, 20:40] = 1000
        Image.fromarray(np.stack([numbers%256, numbers//256, 0*numbers], -1).astype(np.uint8)).save(tmp_path/f'validation-segmentation/{w}/x.png')
    return tmp_path/'validation', wnids

def test_imagenet_s_numbers(imagenet_s, tiny):
    folder, wnids = imagenet_s
    files = ImageFiles(folder, tiny)
    e = files[:2]
    assert not files.skipped and sorted(e.target.tolist()) == sorted(class_numbers(tiny)[wnids[k - 1]] for k in (7, 290))
    assert e.masks.any((1, 2)).all() and e.ignore.any((1, 2)).all() and not (e.masks & e.ignore).any()
    share = e.masks.sum((1, 2))/e.ignore.sum((1, 2))
    assert ((share - 4).abs() < .5).all()  # 400 pixels of the object, 100 to ignore

def test_what_cannot_be_read_is_named_and_the_rest_is_measured(tmp_path, tiny):
    folder = _draw(tmp_path/'photos')
    (folder/'3/text.jpg').write_text('no')
    (folder/'3/cut.png').write_bytes((folder/'3/0.png').read_bytes()[:400])
    Image.new('L', (5, 5)).save(tmp_path/'photos-masks/3/1.png')
    Image.new('L', (96, 80)).save(tmp_path/'photos-masks/207/1.png')  # nothing marked
    files = ImageFiles(folder, tiny)
    table = b.benchmark({('tiny', 'photos'): (tiny, files)}, tmp_path/'run', **QUICK)
    lost = pd.read_csv(tmp_path/'run/skipped.csv')
    assert {Path(p).name for p in lost.what} == {'text.jpg', 'cut.png', '1.png'} and len(lost) == 4
    assert table.picture.nunique() == 5
    unmarked = table[table.picture == str(folder/'207/1.png')]
    assert unmarked.ap.isna().all() and unmarked.srg.notna().all()
    assert table[table.picture == str(folder/'207/0.png')].ap.notna().all()

def test_nothing_readable_at_all(tmp_path, tiny):
    folder = tmp_path/'photos'; (folder/'3').mkdir(parents=True); (folder/'3/a.png').write_text('no')
    with pytest.raises(ValueError, match='none of the 1 images'): b.benchmark({('tiny', 'photos'): (tiny, ImageFiles(folder, tiny))}, tmp_path/'run', **QUICK)

@pytest.mark.parametrize('make, match', [
    (lambda p: p/'nowhere', 'neither a folder nor a CSV'),
    (lambda p: p, 'no images in'),
    (lambda p: _draw(p/'a', classes=('1000',)), 'class 1000 is not one of the 1000'),
    (lambda p: _draw(p/'a', classes=('cat',)), "'cat' names no class"),
])
def test_folders_that_say_nothing(tmp_path, tiny, make, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match): ImageFiles(make(tmp_path), tiny)

def test_fewer_images_than_asked_for(tmp_path, tiny):
    with pytest.warns(UserWarning, match='100 images asked for, 6 found'): files = ImageFiles(_draw(tmp_path/'a'), tiny, count=100)
    assert len(files) == 6

def test_the_same_seed_takes_the_same_images(tmp_path, tiny):
    folder = _draw(tmp_path/'a')
    a, again, other = (ImageFiles(folder, tiny, 3, seed).ids.tolist() for seed in (1, 1, 2))
    assert a == again and a != other

# what is written

def test_marks_do_not_depend_on_how_the_run_is_cut(tmp_path, vit):
    e, order = tasks(vit), ['picture', 'target', 'method', 'rules']
    a, c = (b.benchmark(e, tmp_path/f'{n}', **{**QUICK, 'pictures': n}).sort_values(order).reset_index(drop=True) for n in (1, 4))
    pd.testing.assert_frame_equal(a, c, check_exact=False, rtol=1e-4, atol=1e-5)

def test_killed_and_started_again(tmp_path):
    command = [sys.executable, '-m', 'libragrad_nb.benchmark', '--model', 'vit_digits', '--count', '12', '--pictures', '1', '--no-ablations',
               '--methods', 'input_x_gradient', '--out', str(tmp_path/'run')]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    parts = tmp_path/'run/parts'
    while first.poll() is None and len(list(parts.glob('*.parquet'))) < 3: time.sleep(.02)
    first.send_signal(signal.SIGKILL); first.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob('*.parquet')}
    assert 3 <= len(before) < 12, 'the run was to be killed in between'
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_parquet(tmp_path/'run/results.parquet')
    assert len(table) == 24*3 and not table.duplicated(['model', 'set', 'picture', 'target', 'method', 'rules']).any()
    assert all((parts/name).stat().st_mtime_ns == t for name, t in before.items())
    assert 'wrote' in done.stdout and not list(parts.glob('*.part'))

def test_a_retrained_model_or_other_scenes_do_not_mix(tmp_path, vit):
    b.benchmark(tasks(vit), tmp_path/'run', **QUICK)
    with pytest.raises(ValueError, match='vit_digits 2 digits'): b.benchmark(tasks(vit, 5), tmp_path/'run', **QUICK)
    other = load('vit_digits'); other.head.bias.data += .1
    with pytest.raises(ValueError, match='vit_digits 2 digits'): b.benchmark(tasks(other), tmp_path/'run', **QUICK)

def test_a_model_is_asked_once_what_it_can_have(tmp_path, vit, monkeypatch):
    asked, real = [], b.possible
    monkeypatch.setattr(b, 'possible', lambda model, *more: (asked.append(model), real(model, *more))[1])
    both = tasks(vit) | {('mixer_digits', '2 digits'): (load('mixer_digits'), digit_examples(4, seed=8))}
    b.benchmark(both, tmp_path/'run', **{**QUICK, 'pictures': 1})
    assert len(asked) == 2 and len(list((tmp_path/'run/parts').glob('*.parquet'))) > 4

def test_models_can_be_added_to_a_folder(tmp_path, vit):
    b.benchmark(tasks(vit), tmp_path/'run', **QUICK)
    both = tasks(vit) | {('mixer_digits', '2 digits'): (load('mixer_digits'), digit_examples(4, seed=8))}
    assert set(b.benchmark(both, tmp_path/'run', **QUICK).model) == {'vit_digits', 'mixer_digits'}

def test_the_command_on_files(tmp_path, tiny):
    "Random weights and drawn images: the marks mean nothing, the way there does"
    folder = _draw(tmp_path/'photos')
    save_file(tiny.state_dict(), tmp_path/'weights.safetensors')
    b.main(['--model', 'test_vit', '--images', str(folder), '--checkpoint', str(tmp_path/'weights.safetensors'), '--methods', 'input_x_gradient', 'raw_attention',
            '--out', str(tmp_path/'run'), '--device', 'cpu', '--no-ablations'])
    table = pd.read_parquet(tmp_path/'run/results.parquet')
    assert len(table) == 6*(2*2 + 1) and set(table.model) == {'test_vit'} and table.ap.between(0, 1).all()
    libra = table.query('method == "input_x_gradient" and rules == "libra"')
    plain = table.query('method == "input_x_gradient" and rules == "plain"')
    assert libra.completeness_error.abs().max() < plain.completeness_error.abs().max()

@pytest.mark.parametrize('args, match', [
    (['--model', 'no_such_model'], 'no embedded model'),
    (['--images', 'x'], '--images needs --model'),
    (['--model', 'vit_digits', '--checkpoint', 'x'], '--checkpoint needs'),
    (['--model', 'vit_digits', '--count', '2', '--methods', 'grad_cm'], 'grad_cm'),
    (['--model', 'vit_digits', '--count', '2', '--rules', 'libar'], 'libar'),
])
def test_what_the_command_says_to_mistakes(tmp_path, args, match, capsys):
    with pytest.raises(SystemExit) as e: b.main([*args, '--out', str(tmp_path/'run')])
    assert e.value.code == 2 and match in capsys.readouterr().err

# what it says

def synthetic(shift, n=60):
    rng = np.random.default_rng(0)
    hard = rng.normal(size=n)
    row = lambda rules, extra: pd.DataFrame(dict(model='m', set='s', picture=[f'p{i}' for i in range(n)], target=0, method='a', rules=rules, ap=hard + extra))
    return pd.concat([row('plain', .1*rng.normal(size=n)), row('libra', .1*rng.normal(size=n) + shift)])

@pytest.mark.parametrize('shift, verdict', [(.2, 'better'), (-.2, 'worse'), (0, 'tie')])
def test_verdicts(shift, verdict):
    p = paired(synthetic(shift), 'ap')
    assert p.verdict.tolist() == [verdict] and abs(p.difference.iloc[0] - shift) < .06
    assert count({'ap': p}).loc['ap', verdict] == 1

def test_pairing_narrows():
    t = synthetic(.2)
    m, p = means(t, 'ap'), paired(t, 'ap').iloc[0]
    assert (p.high - p.low) < .3*(m.high - m.low).min()

def test_two_questions_about_one_picture_are_one_witness():
    t = synthetic(.2)
    twice = pd.concat([t, t.assign(target=1)])
    pd.testing.assert_frame_equal(paired(t, 'ap'), paired(twice, 'ap'))

def test_the_packaged_table_is_what_the_command_makes():
    "A small part of it, computed again"
    table = results()
    for name in ('vit_digits', 'gmixer_digits'):
        part = table[(table.model == name) & (table.set == '2 digits')]
        n = part.picture.nunique()
        (model, e), = b.embedded([name], n=n).values()
        runs, sets = b.plan_of(('input_x_gradient', 'fullgrad_plus', 'grad_cam'), ablations=False)
        again = b.measure(model, e[:6], runs, sets).set_index(['picture', 'target', 'method', 'rules'])
        stored = part.set_index(['picture', 'target', 'method', 'rules']).loc[again.index, again.columns]
        for c in again: np.testing.assert_allclose(again[c], stored[c], rtol=2e-3, atol=2e-3, err_msg=c)
