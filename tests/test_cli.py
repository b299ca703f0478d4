"The commands: what they say to mistakes, what they leave on the disk, what a machine reads"
import ast, json, os, re, shlex, signal, subprocess, sys, time
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from libragrad_nb import cli, explain, ledger
from libragrad_nb.scenes import scenes
from libragrad_nb.zoo import load

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, '-m', 'libragrad_nb.cli']

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def call(capsys):
    "Run a command; returns its exit code, and what it said on stdout and stderr"
    def f(line, *more):
        code = cli.main([*shlex.split(line), *map(str, more)])
        return code, *capsys.readouterr()
    return f

def picture(path, seed=0, size=None):
    image = Image.fromarray(((scenes(1, 2, seed=seed).images[0].movedim(0, -1) + 1)*127.5).round().byte().numpy())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (image.resize(size) if size else image).save(path)

def left(folder='.'): return sorted(p.name for p in Path(folder).rglob('*') if p.is_file())

# who is there

def test_every_command_of_the_package_is_a_function_here():
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    scripts = dict(line.split('=') for line in ini['DEFAULT']['console_scripts'].split())
    assert {k.removeprefix('libragrad-') for k in scripts} == set(cli.COMMANDS)
    for name, place in scripts.items():
        module, function = place.split(':')
        assert getattr(import_module(module), function) is cli.COMMANDS[name.removeprefix('libragrad-')]

@pytest.mark.parametrize('name', list(cli.COMMANDS))
def test_help_and_version(call, name):
    code, out, err = call(f'{name} --help')
    assert code == 0 and not err and f'usage: libragrad-{name}' in out and 'example' in out
    assert call(f'{name} --version')[:2] == (0, f'libragrad-{name} {cli.__version__}\n')

@pytest.mark.parametrize('name', ['explain', 'ledger', 'run'])
def test_the_examples_in_the_help_are_commands(call, monkeypatch, name):
    shown, asked = call(f'{name} --help')[1], []
    monkeypatch.setattr(cli, f'_{name}', lambda o: asked.append(o))
    lines = [l.strip() for l in shown.split('examples:')[1].split('methods:')[0].strip().splitlines()]
    for line in lines:
        first, *args = shlex.split(line.partition(' |')[0])
        assert first == f'libragrad-{name}' and cli.COMMANDS[name](args) == 0, line
    assert len(lines) > 2 and len(asked) == len(lines)

def test_all_methods_are_named_in_the_help(call):
    shown = call('explain --help')[1]
    assert all(re.search(rf'\b{m}\b', shown) for m in cli.methods)

def test_one_name_for_all(call):
    assert call('--help')[0] == 0 and call('')[1].count('libragrad-') > len(cli.COMMANDS)
    code, out, err = call('explian')
    assert code == 2 and not out and 'libragrad-explain' in err

# mistakes

@pytest.mark.parametrize('line, said', [
    ('explain', 'name image files'),
    ('explain a.png', '--model NAME'),
    ('explain a.png --scenes 2', 'not both'),
    ('explain --scenes 2 --model vit_digit', 'did you mean vit_digits'),
    ('explain --scenes 2 --model llama_recall', 'reads text'),
    ('explain --scenes 2 --method grad_cm', "did you mean 'grad_cam'"),
    ('explain --scenes 2 --rules libar', 'alilrp'),
    ('explain --scenes 2 --rules without:atention', 'attention'),
    ('explain --scenes 2 --target 10', '10 is not one of the 10 classes'),
    ('explain --scenes 2 --target cat', "'cat' names no class"),
    ('explain --scenes 2 --target -1', "'-1' names no class"),
    ('explain --scenes 2 --model clip_digits --target "a red sevn"', 'did you mean a red seven'),
    ('explain a.png --model vit_digits --target labels', 'for --scenes'),
    ('explain --scenes 2 --digits 7', '1 to 4'),
    ('explain --scenes 0', 'less than 1'),
    ('explain --scenes x', 'invalid'),
    ('explain --scenes 2 --out maps.jpg', '.png, .npz, .html'),
    ('explain --scenes 2 --option steps', 'NAME=VALUE'),
    ('explain --scenes 2 --method integrated_gradients --option stps=3', 'steps'),
    ('explain --scenes 2 --device nowhere', 'no device'),
    ('explain --scenes 2 --checkpoint a.safetensors', 'weights of its own'),
    ('explain a.png --model test_vit --checkpoint nothere.safetensors', 'nothere.safetensors'),
    ('ledger --scenes 1 --target 12', '12 is not one'),
    ('ledger --scenes 1 --rules libar', 'libar'),
    ('ledger --scenes 1 --out level.gif', '.csv, .png or .html'),
    ('ledger --scenes 1 --by weekday', 'invalid choice'),
    ('ledger --scenes 1 --rules plain libra alilrp attnlrp --out l.png', 'three rule sets'),
    ('run nowhere --model vit_digits --out run', 'nowhere'),
    ('run . --out run', '--model'),
    ('run . --out run --model vit_digits --method integrated_gradients --option batch_size=3', 'option of the run itself'),
    ('bench --model nothere', 'nothere'),
    ('support --only nothere', 'nothere'),
])
def test_a_mistake_is_a_sentence_and_a_2(call, line, said):
    code, out, err = call(line)
    assert code == 2 and not out and said in err and 'Traceback' not in err
    own = [l for l in err.splitlines() if l.startswith('libragrad-')]
    assert len(own) == 1 and (err.startswith('usage') or len(err.strip().splitlines()) == 1)
    assert not left()

def test_debug_shows_where(call):
    assert 'Traceback' in call('explain --scenes 2 --target 10 --debug')[2]

def test_what_nobody_thought_of_is_a_sentence_too(call, monkeypatch):
    def broken(o): raise KeyError('surprise')
    monkeypatch.setattr(cli, '_explain', broken)
    code, out, err = call('explain --scenes 1')
    assert code == 1 and err == "libragrad-explain: KeyError (--debug shows where): 'surprise'\n"

def test_weights_that_nobody_can_fetch(call):
    picture('a.png')
    code, out, err = call('explain a.png --model vit_tiny_patch16_224')
    assert code == 1 and 'could not be fetched' in err and 'vit_digits' in err and 'Traceback' not in err

# numbers

@pytest.fixture(scope='module')
def vit(): return load('vit_digits')

def test_the_receipts_are_those_of_explain(call, vit):
    code, out, err = call('explain --scenes 3 --target labels 7 predicted --method fullgrad_plus gen_att grad_cam@plus --rules plain libra --json')
    document = json.loads(out)
    assert code == 0 and not err and document['model'] == 'vit_digits' and document['versions']['torch'] == torch.__version__.split('+')[0] and not document['refused']
    rows = iter(document['explanations'])
    for seed in range(3):
        s = scenes(1, 2, seed=seed)
        for target in (*s.labels[0].tolist(), 7, None):
            for rules in ('plain', 'libra'):
                for m in ('fullgrad_plus', 'gen_att', 'grad_cam@plus'):
                    a, row = explain(vit, s.images, target, m, rules), next(rows)
                    assert (row['image'], row['target'], row['rules']) == (f'scene {seed}', a.target.item(), rules)
                    assert row['score'] == pytest.approx(a.score.item(), abs=1e-4) and row['predicted'] == vit(s.images).argmax().item()
                    assert row['probability'] == pytest.approx(vit(s.images).softmax(-1)[0, row['target']].item(), abs=1e-4)
                    if m == 'gen_att': assert row['on_the_map'] is None and row['completeness_error'] is None; continue
                    parts = [row[k] for k in ('on_the_map', 'prefix', 'unplaced', 'completeness_error')]
                    assert parts == pytest.approx([t.sum().item() for t in (a.map, a.prefix, a.unplaced, a.completeness_error)], abs=1e-3)
                    assert sum(parts) == pytest.approx(row['score'], abs=1e-4)
    assert next(rows, None) is None

def test_numbers_in_a_file(call, vit):
    assert call('explain --scenes 3 --batch-size 2 --target 3 7 --out one.npz --quiet') == (0, '', '')
    one = np.load('one.npz')
    images = torch.cat([scenes(1, 2, seed=seed).images for seed in range(3)])
    expected = explain(vit, images, [3, 7])
    assert one['image'].tolist() == ['scene 0', 'scene 0', 'scene 1', 'scene 1', 'scene 2', 'scene 2'] and one['target'].tolist() == [3, 7]*3
    for k in (0, 1): np.testing.assert_allclose(one['map'][k::2], expected[k].map, atol=1e-4)
    assert call('explain --scenes 1 --method grad_cam gen_att --rules plain libra --out several.npz --quiet')[0] == 0
    assert {k.rpartition('/')[0] for k in np.load('several.npz')} == {f'{m}/{r}' for m in ('grad_cam', 'gen_att') for r in ('plain', 'libra')}

def test_options_reach_the_method(call, vit):
    assert call('explain --scenes 1 --method integrated_gradients --option steps=3 batch_size=2 --out a.npz --quiet')[0] == 0
    s = scenes(1, 2, seed=0)
    a = explain(vit, s.images, None, 'integrated_gradients', steps=3, batch_size=2, progress=False)
    np.testing.assert_allclose(np.load('a.npz')['map'], a.map, atol=1e-5)

def test_families_of_rules_left_out(call):
    rows = json.loads(call('explain --scenes 1 --rules libra without:attention --json')[1])['explanations']
    assert abs(rows[0]['completeness_error']) < 1e-4 < abs(rows[1]['completeness_error']) and rows[1]['rules'] == "without('attention')"

def test_prompts_are_classes_in_words(call):
    rows = json.loads(call('explain --scenes 1 --model clip_digits --target labels "a red seven" --json')[1])['explanations']
    assert len(rows) == 3 and rows[2]['name'] == 'a red seven' and all(r['name'].startswith('a') for r in rows)

def test_the_ledger_is_that_of_the_library(call, vit):
    document = json.loads(call('ledger --scenes 2 --target 3 --json --out l.csv')[1])
    images = torch.cat([scenes(1, 2, seed=seed).images for seed in range(2)])
    for t in document['totals']:
        s = ledger(vit, images, 3, t['rules'])
        assert t['completeness_error'] == pytest.approx(s.completeness_error, abs=1e-4) and t['score'] == pytest.approx(s.score, abs=1e-4)
        residual = {r['operation']: r['residual'] for r in document['rows'] if r['rules'] == t['rules']}
        assert residual == pytest.approx(s.by().residual.to_dict(), abs=1e-4)
    table = pd.read_csv('l.csv')
    assert len(table) == len(document['rows']) and table.residual.sum() == pytest.approx(sum(t['completeness_error'] for t in document['totals']), abs=1e-4)

@pytest.mark.parametrize('by', ['block', 'module', 'rule'])
def test_tables_of_the_ledger(call, by):
    code, out, err = call(f'ledger --scenes 1 --by {by} --rules plain alilrp libra')
    assert code == 0 and not err and 'libra: share' in out and 'completeness error' in out

# pictures and pages

def test_a_picture_and_a_page(call):
    code, out, err = call('explain --scenes 2 --target labels --rules plain libra --method fullgrad_plus grad_cam --out deep/down/maps.png')
    assert code == 0 and 'wrote deep/down/maps.png' in out
    image = Image.open('deep/down/maps.png'); image.load()
    assert image.height > image.width > 600
    assert call('explain --scenes 2 --out page.html --quiet') == (0, '', '')
    page = Path('page.html').read_text(encoding='utf-8')
    assert page.count('<img') == page.count('<h2') == 2 and not re.search(r'(?:src|href)=["\'](?!data:)', page) and 'http' not in page
    assert all(word in page for word in ('scene 1', 'completeness error', 'prefix', 'unplaced', f'torch {torch.__version__.split("+")[0]}', f'libragrad_nb {cli.__version__}'))
    assert call('ledger --scenes 1 --out l.html --quiet') == (0, '', '') and '<img' in Path('l.html').read_text() and 'layer_norm' in Path('l.html').read_text()
    assert call('ledger --scenes 1 --out l.png --quiet') == (0, '', '') and Image.open('l.png').width > 600

@pytest.mark.skipif(os.name == 'nt', reason='no such names there')
def test_whatever_files_are_called(call):
    odd = ['a b.png', 'brû<script>alert(1)<script>.png', '$x_1$.png', 'two\nlines.png', '\x1b[31mred.png', os.fsdecode(b'\xff\xfe.png'), '-dash.png', 'very ' + 'long '*20 + '.png']
    for k, name in enumerate(odd): picture(f'photos/{name}', k)
    code, out, err = call('explain photos --model vit_digits --out page.html')
    assert code == 0 and '\x1b' not in out and 'two\nlines' not in out, err
    page = Path('page.html').read_text(encoding='utf-8')
    assert '<script' not in page and '&lt;script&gt;' in page and page.count('<img') == len(odd)
    assert call('explain photos --model vit_digits --out maps --quiet')[0] == 0 and len(left('maps')) == len(odd)
    assert len(json.loads(call('explain photos --model vit_digits --json')[1])['explanations']) == len(odd)
    assert call('explain --model vit_digits --out d.png --', 'photos/-dash.png')[0] == 0

def test_files_of_one_name(call):
    for k, p in enumerate(('a/x.png', 'b/x.png', 'b/X.jpg', 'b/x-2.png')): picture(p, k)
    assert call('explain a b --model vit_digits --out maps --format npz --quiet')[0] == 0
    assert len({n.lower() for n in left('maps')}) == 4
    assert {str(np.load(f'maps/{n}')['image'][0]) for n in left('maps')} == {'a/x.png', 'b/x.png', 'b/X.jpg', 'b/x-2.png'}

def test_a_folder_with_broken_files(call):
    picture('photos/deep/good.png'); picture('photos/other.jpeg', 1, (300, 200))
    Path('photos/text.png').write_text('no'); Path('photos/empty.jpg').touch(); Path('photos/notes.txt').write_text('not even asked')
    Path('photos/cut.png').write_bytes(Path('photos/deep/good.png').read_bytes()[:500])
    code, out, err = call('explain photos nowhere.png --model vit_digits --out maps --json')
    document = json.loads(out)
    assert code == 1 and [r['image'] for r in document['explanations']] == ['photos/deep/good.png', 'photos/other.jpeg']
    assert {r['image'] for r in document['refused']} == {'photos/text.png', 'photos/empty.jpg', 'photos/cut.png', 'nowhere.png'} and all(r['why'] for r in document['refused'])
    assert err.count('left out: ') == 4 == len(err.splitlines()) and sorted(document['written']) == ['maps/good.png', 'maps/other.png'] and left('maps') == ['good.png', 'other.png']

def test_nothing_but_broken_files(call):
    Path('a.png').write_text('no'); Path('empty').mkdir()
    code, out, err = call('explain a.png empty --model vit_digits --out maps.png')
    assert code == 1 and not out and 'empty is a folder without images' in err and left() == ['a.png']
    assert call('ledger a.png --model vit_digits --out l.csv')[0] == 1 and left() == ['a.png']

# the disk

def test_a_full_disk_leaves_what_was_there(call, monkeypatch):
    Path('maps.npz').write_text('yesterday')
    def full(f, **arrays): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez_compressed', full)
    code, out, err = call('explain --scenes 1 --out maps.npz')
    assert code == 1 and 'No space left on device' in err and len(err.splitlines()) == 1 and not out
    assert Path('maps.npz').read_text() == 'yesterday' and left() == ['maps.npz']

def test_a_place_where_nothing_can_be_written(call):
    Path('file').touch()
    for line in ('explain --scenes 1 --out file/maps.png', 'explain --scenes 1 --out file/maps', 'ledger --scenes 1 --out file/l.csv', 'explain --scenes 1 --out file'):
        code, out, err = call(line)
        assert code in (1, 2) and len(err.splitlines()) == 1 and 'file' in err and not out

def start(line, **kwargs): return subprocess.Popen([*PYTHON, *shlex.split(line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)

def stopped(line, how, folder):
    "Send a signal once a third file is there; exit code and stderr"
    p = start(line)
    while p.poll() is None and len(list(Path(folder).glob('*.png'))) < 3: time.sleep(.02)
    p.send_signal(how)
    _, err = p.communicate(timeout=60)
    return p.returncode, err.decode()

@pytest.mark.skipif(os.name == 'nt', reason='other signals')
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_between(how):
    code, err = stopped('explain --scenes 300 --out maps', how, 'maps')
    assert code == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT: assert err.strip() == 'libragrad-explain: interrupted' and not list(Path('maps').glob('*.part'))
    written = list(Path('maps').glob('*.png'))
    assert 3 <= len(written) < 300
    for p in written: Image.open(p).load()

@pytest.mark.skipif(os.name == 'nt', reason='other pipes')
def test_a_reader_that_has_gone():
    p = start('explain --help', env={k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}) # the flush at the end finds nobody
    p.stdout.close()
    err = p.stderr.read().decode(); p.wait(60)
    assert not err and p.returncode == 141

# machines

def test_warnings_are_sentences_on_stderr(call, monkeypatch):
    import warnings
    class Old(UserWarning, DeprecationWarning): "For developers, as pyparsing has them"
    def gap(*a): warnings.warn('mind the gap'); warnings.warn('will go', Old); return real(*a)
    real = cli._says
    monkeypatch.setattr(cli, '_says', gap)
    code, out, err = call('explain --scenes 1 --json')
    assert code == 0 and json.loads(out) and err == 'warning: mind the gap\n'
    assert call('explain --scenes 1 --quiet') == (0, '', '')

# data sets

def test_a_run_goes_on_where_it_stopped(call):
    from libragrad_nb.scale import read_run
    for k in range(4): picture(f'photos/{k}.png', k)
    code, out, _ = call('run photos --model vit_digits --out run --batch-size 2 --rules plain')
    assert code == 0 and '4 images explained, 0 were there before' in out
    picture('photos/new.png', 9); Path('photos/bad.png').write_text('no')
    code, out, err = call('run photos --model vit_digits --out run --batch-size 2 --rules plain --json')
    document = json.loads(out)
    assert code == 1 and document['explained'] == 1 and document['before'] == 4 and [r['image'] for r in document['refused']] == ['bad.png'] and 'left out' in err
    frame, maps = read_run('run')
    assert sorted(frame.id) == ['0.png', '1.png', '2.png', '3.png', 'new.png'] and set(frame.rules) == {'plain'} and maps.shape == (5, 8, 8)
    code, out, err = call('run photos --model vit_digits --out run')
    assert code == 2 and 'rules' in err and 'another folder' in err

def test_a_run_asks_for_the_classes_of_its_folders(call):
    from libragrad_nb.scale import read_run
    for k in range(2): picture(f'photos/{7 + k}/a.png', k)
    assert call('run photos --model vit_digits --out named --quiet') == (0, '', '') and call('run photos --model vit_digits --out free --predicted --quiet') == (0, '', '')
    assert sorted(read_run('named')[0].target) == [7, 8] and sorted(read_run('free')[0].target) == sorted(json.loads(call('explain photos --model vit_digits --json')[1])['explanations'][k]['target'] for k in range(2))
    picture('photos/nine/a.png', 3)
    code, out, err = call('run photos --model vit_digits --out other')
    assert code == 2 and "'nine' names no class" in err

def test_options_of_a_run(call, monkeypatch):
    from libragrad_nb import scale
    picture('photos/a.png')
    assert call('run photos --model vit_digits --out run --method integrated_gradients --option steps=3 --quiet')[0] == 0
    assert call('explain photos --model vit_digits --method integrated_gradients --option steps=3 --out a.npz --quiet')[0] == 0
    np.testing.assert_allclose(scale.read_run('run')[1][0], np.load('a.npz')['map'][0], atol=.01)
    asked = []
    monkeypatch.setattr(scale, 'run_on_ray', lambda *a, **k: asked.append((a, k)) or scale.Run(Path('run'), 1, 0, {}, 1.))
    assert call('run photos --model vit_digits --out run --ray 3 --batch-size 4 --predicted')[0] == 0
    given = asked[0][1]
    assert asked[0][0][:3] == ('photos', 'run', 'vit_digits') and given.pop('device') is None and given == dict(concurrency=3, batch_size=4, shard_size=512, targets=False, progress=False)

# weights

class Trap:
    "What a pickle can do"
    def __reduce__(self): return os.mkdir, ('sprung',)

@pytest.mark.parametrize('ending', ['pth', 'pt', 'bin', 'npz', 'ckpt', 'safetensors'])
def test_pickles_stay_closed(call, ending):
    torch.save(Trap(), f'mine.{ending}'); picture('a.png')
    code, out, err = call(f'explain a.png --model test_vit --checkpoint mine.{ending}')
    assert code == 2 and not out and not Path('sprung').exists()
    assert 'no safetensors file' in err if ending == 'safetensors' else 'weights_only=True' in err and "'mine.safetensors'" in err

def test_weights_of_ones_own_bring_their_classes(call):
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=7).eval()
    save_file(model.state_dict(), 'mine.safetensors'); picture('a.png', size=(200, 160))
    document = json.loads(call('explain a.png --model test_vit --checkpoint mine.safetensors --target 6 predicted --json')[1])
    assert [r['target'] for r in document['explanations']][0] == 6 and all(abs(r['completeness_error']) < 1e-3 for r in document['explanations'])
    assert call('explain a.png --model test_vit --checkpoint mine.safetensors --target 7')[0] == 2
    assert call('explain --scenes 2 --model test_vit --checkpoint mine.safetensors --out scenes.html --quiet') == (0, '', '') # drawn in the size of the model
    code, out, err = call('explain a.png --model vit_tiny_patch16_224 --checkpoint mine.safetensors')
    assert code == 2 and 'do not fit vit_tiny_patch16_224' in err and len(err.splitlines()) == 1

def test_classes_of_imagenet_in_words(call):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model('test_vit').state_dict(), 'mine.safetensors'); picture('a.png')
    named = lambda *t: [(r['target'], r['name']) for r in json.loads(call('explain a.png --model test_vit --checkpoint mine.safetensors --json --target', *t)[1])['explanations']]
    assert named('tabby', 'n02123045', '281', 'TABBY CAT') == [(281, 'tabby, tabby cat')]*4
    code, out, err = call('explain a.png --model test_vit --checkpoint mine.safetensors --target tabbi')
    assert code == 2 and 'did you mean tabby' in err

READERS = {'torch': {'load'}, 'joblib': {'load'}, 'pd': {'read_pickle'}, 'pandas': {'read_pickle'}}

def opens_pickles(source):
    "Lines of code that import a pickle, or call what opens one"
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] + [getattr(node, 'module', None) or ''] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if any(n.split('.')[0] in ('pickle', 'dill', 'cloudpickle', 'joblib', 'shelve') for n in names): yield node.lineno
        if isinstance(node, ast.Call) and isinstance(f := node.func, ast.Attribute) and isinstance(f.value, ast.Name) and f.attr in READERS.get(f.value.id, ()): yield node.lineno
        if isinstance(node, ast.keyword) and node.arg == 'allow_pickle' and getattr(node.value, 'value', True): yield node.value.lineno

def test_nothing_in_the_package_opens_a_pickle():
    assert list(opens_pickles("import pickle\ntorch.load('a')\nnp.load('a', allow_pickle=True)\nfrom joblib import load")) == [1, 4, 2, 3]
    assert not {p.name: found for p in (ROOT/'libragrad_nb').glob('*.py') if (found := list(opens_pickles(p.read_text(encoding='utf-8'))))}

# the other commands

@pytest.mark.parametrize('name, module', [('bench', 'benchmark'), ('support', 'support'), ('demo', 'demo')])
def test_commands_of_other_modules_get_their_arguments(call, monkeypatch, name, module):
    m, got = import_module(f'libragrad_nb.{module}'), []
    monkeypatch.setattr(m, 'main', got.append)
    assert call(f'{name} --out there')[0] == 0 and got == [['--out', 'there']]
    def broken(args): raise OSError(28, 'No space left on device', 'there')
    monkeypatch.setattr(m, 'main', broken)
    assert call(name) == (1, '', f'libragrad-{name}: there: No space left on device\n')

def strictly(text): return json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))

@pytest.mark.parametrize('line, rows', [('demo --scenes 3', 'rows'), ('bench --model vit_digits --count 2 --methods input_x_gradient --no-ablations --out bench', 'means'),
                                        ('support --only resnet --out rows.jsonl', 'rows')])
def test_the_other_commands_speak_to_machines_too(call, line, rows):
    code, out, err = call(f'{line} --json --quiet')
    document = strictly(out)
    assert code == 0 and not err and document['command'] == f'libragrad-{line.split()[0]}' and document[rows] and all(map(os.path.exists, document['written']))
    assert call(f'{line} --quiet') == (0, '', '')

def test_a_benchmark_that_is_interrupted_says_how_to_go_on(call, monkeypatch):
    from libragrad_nb import benchmark
    def pressed(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(benchmark, 'benchmark', pressed)
    code, out, err = call('bench --model vit_digits --count 2 --out run')
    assert code == 130 and 'start the same command again' in err and 'Traceback' not in err
