"Data sets: nothing lost, nothing twice, nothing mixed, whatever happens"
import io, os, pickle, random, resource, signal, subprocess, sys, textwrap, time, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer
from libragrad_nb import explain, scale
from libragrad_nb.scale import Explainer, images_of, read_run, run

QUICK = dict(batch_size=4, shard_size=8, progress=False, device='cpu')

def small(seed=0, classes=10):
    "A ViT of two blocks for 32 x 32 pixels"
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=classes).eval()
    model.pretrained_cfg = dict(input_size=(3, 32, 32), mean=(.5,)*3, std=(.5,)*3, crop_pct=1., architecture='small')
    return model

def picture(i): return Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8))

def photos(folder, n=20, classes=2):
    "A folder of class folders"
    for i in range(n):
        path = folder/f'{i%classes}/{i:03d}.png'; path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder

def png(image):
    out = io.BytesIO(); image.save(out, 'PNG')
    return out.getvalue()

@pytest.fixture
def folder(tmp_path): return photos(tmp_path/'photos')

def tidy(out): assert not list(Path(out).glob('*.part')) and (ids := read_run(out)[0].id.tolist()) and len(ids) == len(set(ids)); return sorted(ids)

# the explainer

def batch(n=3): return dict(id=np.array([f'i{k}' for k in range(n)]), image=torch.stack([Explainer(small(), device='cpu').ready.transform(picture(k)) for k in range(n)]))

@pytest.mark.parametrize('method', [None, 'grad_cam', 'pixel_x_gradient'])
@pytest.mark.parametrize('rules', [None, 'plain'])
def test_the_columns_are_what_explain_says(method, rules):
    model, b = small(), batch()
    got, a = Explainer(model, method, rules, device='cpu')(dict(b, target=[1, 2, 3])), explain(model, b['image'], torch.tensor([1, 2, 3]), method, rules)
    assert got['id'].tolist() == ['i0', 'i1', 'i2'] and got['target'].tolist() == [1, 2, 3] and {len(v) for v in got.values()} == {3}
    for k in ('score', 'completeness_error', 'additive_share'): np.testing.assert_array_equal(got[k], getattr(a, k).numpy())
    assert got['map'].dtype == np.float16 and got['map'].shape == (3, *a.map.shape[1:]) == (3, got['rows'][0], got['cols'][0])
    np.testing.assert_allclose(got['map'].astype(float)*got['map_scale'][:, None, None], a.map, rtol=2**-11, atol=2**-24*got['map_scale'].max())
    assert set(got['method']) == {a.method} and set(got['rules']) == {a.rules} and set(got['model']) == {'small'} and 'torch' in got['versions'][0]

def test_without_targets_the_predicted_classes_are_explained():
    model, b = small(), batch()
    assert Explainer(model, device='cpu')(b)['target'].tolist() == model(b['image']).argmax(-1).tolist()

def test_arrays_and_tensors_say_the_same():
    b, e = batch(), Explainer(small(), device='cpu')
    frozen = b['image'].numpy().copy(); frozen.flags.writeable = False # as Ray passes them
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        np.testing.assert_array_equal(e(b)['map'], e(dict(b, image=frozen))['map'])

def test_it_travels():
    e, b = Explainer(small(), 'grad_cam', 'plain', device='cpu', block=1), batch()
    first = e(b); again = pickle.loads(pickle.dumps(e))(b)
    for k in first: np.testing.assert_array_equal(first[k], again[k])

def test_a_name_travels_without_its_weights():
    e = Explainer('vit_digits', device='cpu')
    assert e.model is not None and len(pickle.dumps(e)) < 1000 and pickle.loads(pickle.dumps(e)).name == 'vit_digits'

def test_a_function_makes_the_model_where_it_is_needed():
    made = []
    e = Explainer(lambda: made.append(1) or small(), device='cpu')
    assert not made and len(e(batch())['id']) == 3 and len(made) == 1

def test_the_model_is_left_alone():
    model = small(); before = {k: v.clone() for k, v in model.state_dict().items()}
    model.requires_grad_(False); Explainer(model, device='cpu')(batch())
    assert not any(p.requires_grad for p in model.parameters()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize('size', [1e-30, 1e-7, 1., 3e4, 7e4, 1e30, 1e300])
def test_half_precision_holds_any_size(size):
    maps = size*torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)); maps[2] = 0
    half, by = scale._half(maps)
    assert half.dtype == np.float16 and np.isfinite(half).all() and (np.abs(half) <= 1).all() and (np.log2(by) % 1 == 0).all()
    np.testing.assert_allclose(half.astype(float)*by[:, None, None], maps, rtol=2**-11, atol=2**-24*2*size)

def test_what_is_not_a_number_stays_what_it_is():
    maps = torch.tensor([[[1., float('nan')], [float('inf'), -2.]]])
    half, by = scale._half(maps)
    np.testing.assert_array_equal(half[0]*by, maps[0])

@pytest.mark.parametrize('given, match', [
    (dict(method='grad_cm'), 'did you mean'), (dict(rules='libar'), 'unknown rule set'), (dict(method='grad_cam', stepz=3), 'no option stepz'), (dict(blok=1), 'no option blok'),
    (dict(method=['grad_cam', 'fullgrad']), 'a method is a name'),
])
def test_mistakes_are_told_before_anything_is_read(given, match):
    with pytest.raises((ValueError, TypeError), match=match): Explainer(small(), **given)

def test_a_model_that_does_not_say_how_it_looks(folder, tmp_path):
    model = small(); del model.pretrained_cfg
    with pytest.raises(ValueError, match='pass transform='): run(folder, tmp_path/'out', model, **QUICK)
    to = lambda image: torch.from_numpy(np.array(image)).movedim(-1, 0)/127.5 - 1
    assert len(run(folder, tmp_path/'out', model, transform=to, **QUICK)) == 20

# sources

class Listed:
    "Behaves as a data set of Hugging Face: rows are dictionaries with a decoded image"
    def __init__(self, n, broken=()): self.n, self.broken, self.asked = n, broken, []
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.asked.append(i)
        if i in self.broken: raise SyntaxError('broken PNG file')
        return dict(image=picture(i), label=i%2)

def table(tmp_path, n=20):
    "A folder with two Parquet files of several row groups, images as Hugging Face stores them"
    (tmp_path/'data').mkdir()
    for k, part in enumerate(np.array_split(range(n), 2)):
        rows = [dict(image=dict(bytes=png(picture(i)), path=f'{i:03d}.png'), label=i%2) for i in part]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path/f'data/{k}.parquet', row_group_size=4)
    return tmp_path/'data'

def flat(tmp_path, n=20):
    (tmp_path/'flat').mkdir()
    for i in range(n): picture(i).save(tmp_path/f'flat/{i:03d}.png')
    return tmp_path/'flat'

def listed(tmp_path, n=20):
    flat(tmp_path, n)
    pd.DataFrame(dict(image=[f'flat/{i:03d}.png' for i in range(n)], target=[i%2 for i in range(n)], id=[f'n{i:03d}' for i in range(n)])).to_csv(tmp_path/'list.csv', index=False)
    return tmp_path/'list.csv'

SOURCES = dict(folders=lambda p: photos(p/'photos'), csv=listed, parquet=table, dataset=lambda p: Listed(20), triples=lambda p: [(f'{i}', lambda i=i: picture(i), i%2) for i in range(20)])

@pytest.mark.parametrize('kind', SOURCES)
def test_all_sources_say_the_same(tmp_path, kind):
    r = run(SOURCES[kind](tmp_path), tmp_path/'out', small(), **QUICK)
    t, maps = r.read()
    assert len(r) == len(t) == 20 and not r.skipped and len(tidy(tmp_path/'out')) == 20
    order = np.argsort([t.score.iloc[k] for k in range(20)])
    reference = Explainer(small(), device='cpu'); e = reference(dict(id=np.arange(20), image=torch.stack([reference.ready.transform(picture(i)) for i in range(20)]), target=np.arange(20)%2))
    np.testing.assert_allclose(t.score.to_numpy()[order], np.sort(e['score']), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps[order], (e['map'].astype(np.float32)*e['map_scale'][:, None, None])[np.argsort(e['score'])], rtol=1e-2, atol=1e-4)
    assert sorted(t.target) == [0]*10 + [1]*10

@pytest.mark.parametrize('kind', SOURCES)
def test_parts_travel(tmp_path, kind):
    if kind == 'triples': pytest.skip('functions of a test do not')
    s = images_of(SOURCES[kind](tmp_path))
    got = [(i, np.array(load())) for part in pickle.loads(pickle.dumps(s.parts)) for i, load, _ in part]
    assert len(got) == len(s) == 20 and all(np.array_equal(a, load()) and i == j for (i, a), (j, load, _) in zip(got, s))

def test_a_flat_folder_has_no_targets(tmp_path):
    model, s = small(), images_of(flat(tmp_path, 6))
    t, _ = run(s, tmp_path/'out', model, **QUICK).read()
    assert s.targets is False and t.id.tolist() == [f'{i:03d}.png' for i in range(6)]
    assert t.target.tolist() == [model(Explainer(model, device='cpu').ready.transform(picture(i))[None]).argmax().item() for i in range(6)]

def test_classes_can_be_left_alone(folder, tmp_path):
    model = small(); t, _ = run(folder, tmp_path/'out', model, targets=False, **QUICK).read()
    assert t.target.tolist() == [model(Explainer(model, device='cpu').ready.transform(Image.open(folder/i))[None]).argmax().item() for i in t.id]

def test_a_dataset_is_read_once_a_row(tmp_path):
    data = Listed(20, broken={7}); r = run(data, tmp_path/'out', small(), **QUICK)
    assert len(r) == 19 and list(r.skipped) == ['7'] and 'broken PNG' in r.skipped['7'] and sorted(data.asked) == [0, *range(20)] # the first one tells the columns

def test_the_first_row_may_be_broken(tmp_path): assert list(run(Listed(9, broken={0}), tmp_path/'out', small(), **QUICK).skipped) == ['0']

def test_parquet_of_bytes_paths_and_ids(tmp_path):
    flat(tmp_path, 6)
    pq.write_table(pa.table(dict(id=[10*i for i in range(6)], image=[png(picture(i)) for i in range(6)])), tmp_path/'bytes.parquet')
    pq.write_table(pa.table(dict(key=[f'k{i}' for i in range(6)], image=[f'flat/{i:03d}.png' for i in range(6)])), tmp_path/'paths.parquet')
    for name, ids in (('bytes', [str(10*i) for i in range(6)]), ('paths', [f'k{i}' for i in range(6)])):
        s = list(images_of(tmp_path/f'{name}.parquet'))
        assert [i for i, *_ in s] == ids and all(np.array_equal(load(), picture(k)) and t is None for k, (_, load, t) in enumerate(s))

def test_class_names_of_imagenet(tmp_path):
    photos(tmp_path/'photos', 4, 1); (tmp_path/'photos/0').rename(tmp_path/'photos/n01443537')
    import timm
    t, _ = run(tmp_path/'photos', tmp_path/'out', timm.create_model('test_vit').eval(), **QUICK).read()
    assert set(t.target) == {1}

def bad_parquet(p, **columns): pq.write_table(pa.table(columns), p/'a.parquet'); return p/'a.parquet'
def write(p, text): p.write_text(text); return p

@pytest.mark.parametrize('make, match', [
    (lambda p: p/'nowhere', 'there is no'), (lambda p: p, 'no images in'), (lambda p: write(p/'a.csv', 'image\na.png\na.png\n'), "'a.png' more than once"),
    (lambda p: write(p/'a.csv', 'image,class\na.png,3\nb.png,\n'), 'no class in row 2'), (lambda p: write(p/'a.csv', 'image,class\na.png,30\n'), 'class 30 is not one of the 10.*targets=False'),
    (lambda p: photos(p/'a', 2, 1) and (p/'a/0').rename(p/'a/cat') and p/'a', "'cat' names no class.*targets=False"), (lambda p: bad_parquet(p, x=[1]), 'no column image'),
    (lambda p: bad_parquet(p, image=[b'', b''], id=[1, 1]), "'1' more than once"), (lambda p: bad_parquet(p, image=[b'', b''], label=[1, None]), 'some rows have no label'),
    (lambda p: write(p/'a.parquet', 'no'), 'a.parquet'), (lambda p: [('a', lambda: picture(0), None)]*2, "'a' comes twice"),
    (lambda p: [('a', lambda: picture(0), 1), ('b', lambda: picture(0), None)], 'b has no class and others have'),
    (lambda p: flat(photos(p/'a', 2, 1).parent, 2) and picture(0).save(p/'a/x.png') or p/'a', 'images beside folders'),
])
def test_sources_that_say_nothing(tmp_path, make, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match): run(make(tmp_path), tmp_path/'out', small(), **QUICK)

# stop and go on

def test_what_is_done_is_not_done_again(folder, tmp_path):
    out = tmp_path/'out'
    assert repr(first := run(folder, out, small(), **QUICK)).count('20 images explained') and first.before == 0
    before = {p: p.stat().st_mtime_ns for p in out.glob('*.parquet')}
    picture(99).save(folder/'1/new.png')
    second = run(folder, out, small(), **QUICK)
    assert (second.explained, second.before) == (1, 20) and len(tidy(out)) == 21 and all(p.stat().st_mtime_ns == t for p, t in before.items())

def test_the_model_fails_in_the_middle(folder, tmp_path):
    model, calls = small(), []
    def fails(module, args):
        calls.append(1)
        if len(calls) == 4: raise RuntimeError('out of memory')
    hook = model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match='out of memory'): run(folder, tmp_path/'out', model, **QUICK)
    hook.remove()
    assert len(tidy(tmp_path/'out')) == 12 # three batches of four: a file of 8, and one of what was left
    assert run(folder, tmp_path/'out', model, **QUICK).explained == 8 and len(tidy(tmp_path/'out')) == 20

def test_the_maps_may_lie_beside_the_images(folder, tmp_path):
    for source in (folder, flat(tmp_path, 5)):
        first = run(source, source/'maps', small(), **QUICK)
        assert run(source, source/'maps', small(), **QUICK).before == first.explained > 0

def test_a_full_disk(folder, tmp_path, monkeypatch):
    real, calls = pq.write_table, []
    def full(table, path):
        calls.append(path)
        if len(calls) == 2: Path(path).write_bytes(b'PAR1 half'); raise OSError(28, 'No space left on device')
        real(table, path)
    monkeypatch.setattr(pq, 'write_table', full)
    with pytest.raises(OSError, match='No space'): run(folder, tmp_path/'out', small(), **QUICK)
    monkeypatch.undo()
    run(folder, tmp_path/'out', small(), **QUICK)
    assert len(tidy(tmp_path/'out')) == 20

def test_what_cannot_be_read_is_written_down_and_tried_again(folder, tmp_path):
    (folder/'1/cut.png').write_bytes(png(picture(1))[:300]); (folder/'0/text.jpg').write_text('no')
    r = run(folder, tmp_path/'out', small(), **QUICK)
    table = pd.read_csv(tmp_path/'out/skipped.csv')
    assert sorted(table.id) == sorted(r.skipped) == ['0/text.jpg', '1/cut.png'] and table.why.str.contains('damaged|no image').all() and len(r) == 20
    picture(5).save(folder/'1/cut.png')
    r = run(folder, tmp_path/'out', small(), **QUICK)
    assert list(r.skipped) == pd.read_csv(tmp_path/'out/skipped.csv').id.tolist() == ['0/text.jpg'] and r.explained == 1
    (folder/'0/text.jpg').unlink()
    assert not run(folder, tmp_path/'out', small(), **QUICK).skipped and not len(pd.read_csv(tmp_path/'out/skipped.csv'))

def test_nothing_can_be_read(tmp_path):
    (tmp_path/'photos').mkdir(); (tmp_path/'photos/a.png').write_text('no')
    r = run(tmp_path/'photos', tmp_path/'out', small(), **QUICK)
    assert len(r) == 0 and len(r.skipped) == 1
    with pytest.raises(FileNotFoundError, match='no maps'): r.read()

def test_nothing_is_mixed(folder, tmp_path):
    out, other = tmp_path/'out', small(); run(folder, out, small(), **QUICK)
    other.head.bias.data += .1
    for change in (lambda: run(folder, out, other, **QUICK), lambda: run(folder, out, small(), 'grad_cam', **QUICK), lambda: run(folder, out, small(), rules='plain', **QUICK),
                   lambda: run(folder, out, small(), targets=False, **QUICK), lambda: run(flat(tmp_path), out, small(), **QUICK),
                   lambda: run(folder, out, small(), transform=lambda image: torch.zeros(3, 32, 32), **QUICK)):
        with pytest.raises(ValueError, match='holds results with other'): change()
    assert run(folder, out, small(), **{**QUICK, 'batch_size': 7, 'shard_size': 3, 'workers': 0}).before == 20

def test_one_run_a_folder(folder, tmp_path):
    from filelock import FileLock
    (tmp_path/'out').mkdir()
    with FileLock(tmp_path/'out/.lock'), pytest.raises(ValueError, match='another run is writing'): run(folder, tmp_path/'out', small(), **QUICK)

def test_a_damaged_shard_is_named(folder, tmp_path):
    run(folder, tmp_path/'out', small(), **QUICK)
    shard = min((tmp_path/'out').glob('*.parquet')); shard.write_bytes(shard.read_bytes()[:100])
    for f in (lambda: read_run(tmp_path/'out'), lambda: run(folder, tmp_path/'out', small(), **QUICK)):
        with pytest.raises(ValueError, match=f'{shard.name} is damaged.*delete it'): f()
    shard.unlink(); run(folder, tmp_path/'out', small(), **QUICK)
    assert len(tidy(tmp_path/'out')) == 20

def test_control_c_finishes_the_shard(folder, tmp_path, capfd):
    items = [(i, (lambda load=load, i=i: (signal.raise_signal(signal.SIGINT) if i.endswith('011.png') else None, load())[1]), t) for i, load, t in images_of(folder)]
    with pytest.raises(KeyboardInterrupt, match='run it again to go on'): run(items, tmp_path/'out', small(), **{**QUICK, 'workers': 0})
    n = len(tidy(tmp_path/'out'))
    assert 0 < n < 20 and n % 4 == 0 and 'stopping after this batch' in capfd.readouterr().err and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run([(i, load, t) for i, load, t in images_of(folder)], tmp_path/'out', small(), **QUICK).explained == 20 - n

def test_control_c_twice_stops_at_once(folder, tmp_path):
    def load(): signal.raise_signal(signal.SIGINT); return picture(0)
    with pytest.raises(KeyboardInterrupt): run([('a', load, 1), ('b', load, 1)], tmp_path/'out', small(), **{**QUICK, 'workers': 0})
    assert not list((tmp_path/'out').glob('*.parquet')) and signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_maps_of_two_sizes(tmp_path):
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10, dynamic_img_size=True).eval()
    to = lambda image: torch.from_numpy(np.array(image)).movedim(-1, 0)/127.5 - 1
    items = [(f'{i}', lambda i=i: picture(i).resize((32, 32) if i%2 else (48, 32)), 1) for i in range(6)]
    t, maps = run(items, tmp_path/'out', model, transform=to, **{**QUICK, 'batch_size': 1}).read()
    assert [m.shape for m in maps] == [(4, 6), (4, 4)]*3 and len(tidy(tmp_path/'out')) == 6
    for i, m in zip(t.id, maps): np.testing.assert_allclose(m, explain(model, to(items[int(i)][1]())[None], 1).map[0], rtol=1e-2, atol=1e-3)

# kill -9

KILLED = textwrap.dedent('''
    "Import once; then fork runs and kill them, as nobody can catch it"
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from test_scale import small, scale
    folder, base, seed, kills = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    dice, killed, parts, k, seen = random.Random(seed), 0, 0, 0, 0
    while killed < kills:
        out, (heard, say) = base/f'run{k}', os.pipe()
        child = os.fork()
        if not child:
            model = small(); model.register_forward_pre_hook(lambda *_: os.write(say, b'.'))
            scale.run(folder, out, model, batch_size=4, shard_size=4, progress=False, device='cpu'); os._exit(0)
        os.close(say)
        if dice.random() < .8: os.read(heard, 1)  # most of them while maps are made, some at any time
        time.sleep(dice.uniform(0, .3)); os.close(heard)
        os.kill(child, signal.SIGKILL)
        how = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(how): killed += 1
        else: assert os.WEXITSTATUS(how) == 0; k += 1  # it was done before: begin another folder
        if out.exists():
            parts += len(list(out.glob('*.part')))
            done = scale._done(out); n = sum(len(scale.pq.read_table(p)) for p in scale._shards(out))
            assert len(done) == n, f'{n} rows, {len(done)} ids'
            print(how, len(done), flush=True)
    print('killed', killed, 'half files', parts, 'folders', k + 1)
''')

def test_killed_twenty_times(tmp_path):
    seed = random.SystemRandom().randrange(10**6); print('seed', seed)
    folder = photos(tmp_path/'photos', 400, 2); (folder/'1/broken.png').write_text('no')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(Path(scale.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])}
    p = subprocess.run([sys.executable, '-c', KILLED, str(Path(__file__).parent), str(folder), str(tmp_path), str(seed), '20'], capture_output=True, text=True, env=env, timeout=300)
    print(p.stdout, p.stderr)
    assert p.returncode == 0 and 'killed 20' in p.stdout
    expected = sorted(i for i, *_ in images_of(folder) if 'broken' not in i)
    clean = run(folder, tmp_path/'clean', small(), **QUICK).read()
    for out in tmp_path.glob('run*'):
        r = run(folder, out, small(), **QUICK)
        assert tidy(out) == expected and list(r.skipped) == ['1/broken.png']
        (t, maps), (c, reference) = r.read(), clean
        np.testing.assert_allclose(maps[t.id.argsort()], reference[c.id.argsort()], rtol=1e-2, atol=1e-3) # and they are the same

# memory

def test_memory_stays_flat(tmp_path):
    "Peak memory of the process at a quarter of three thousand images, and at the end"
    now, seen = (lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024), []
    flat = [png(picture(i)) for i in range(50)]
    n, files = 3000, tmp_path/'photos'; files.mkdir()
    for i in range(n): (files/f'{i:05d}.png').write_bytes(flat[i % 50])
    e = Explainer(small(), device='cpu')
    def noted(module, args): seen.append(now())
    e.model.register_forward_pre_hook(noted)
    r = run(files, tmp_path/'out', e.model, batch_size=32, shard_size=256, progress=False, device='cpu')
    at = seen[len(seen)//4]
    print(f'{r}: {seen[0]:.0f} MB, {at:.0f} MB at a quarter, {seen[-1]:.0f} MB at the end')
    assert len(r) == n and seen[-1] - at < 10, (at, seen[-1])
